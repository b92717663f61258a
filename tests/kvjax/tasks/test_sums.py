"""Running sums of numbers that lie about."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.sums import Sums
from tests.puzzles import MATERIAL, asked, check_answers, said, some_examples, statements

CONTEXT = "[NUM]<20><3>The oven[NUM]<30><9> was cold[NUM]<40><8>. [NUM]<50><1>"
EXAMPLE = Example(context=CONTEXT, question="[SUM]<20><30><40>[ANS]", answer="<20><3><3><30><9><2><40><8><0>[END]")


def answer_of(context, question):
    digits = dict(statements(context, "[NUM]"))
    total, steps = 0, []
    for name in asked(question, "[SUM]", end="[ANS]"):
        total += digits[name]
        steps += [name, digits[name], total % 10]
    return said(steps)


def test_the_running_sums_are_the_answer():
    check_answers([EXAMPLE, *some_examples(Sums())], answer_of)


def test_only_the_whole_chain_scores():
    assert Sums().score("<20><3><3><30><9><2><40><8><0>[END]", EXAMPLE) == 1.0
    wrong = [
        *("", "<0>[END]", "<20><3><3><30><9><2>[END]"),
        "<20><3><3><30><9><12><40><8><20>[END]",  # not modulo 10
        "<20><3><3><30><9><2><40><8><1>[END]",
        "<20><3><3><40><8><1><30><9><0>[END]",  # another order
    ]
    assert [Sums().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_further_questions_are_about_the_same_numbers():
    example = Sums().example(np.random.default_rng(0), MATERIAL, more=5)
    assert len({question for question, _ in example.more}) == 5
    check_answers([example], answer_of)


@pytest.mark.parametrize("largest", [1, 9])
def test_numbers_go_up_to_the_largest(largest):
    examples = some_examples(Sums(largest=largest))
    assert {digit for one in examples for _, digit in statements(one.context, "[NUM]")} == set(range(largest + 1))
    check_answers(examples, answer_of)


def test_numbers_and_terms_are_as_many_as_asked_for():
    for example in some_examples(Sums(numbers=9, terms=9)):
        numbers = statements(example.context, "[NUM]")
        assert len(numbers) == 9
        assert all(digit <= 4 and name >= 10 for name, digit in numbers)
        assert set(asked(example.question, "[SUM]", end="[ANS]")) == {name for name, _ in numbers}
        assert example.facts == {"terms": 9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numbers": 0}, r"sums\(numbers\) is 0; it must be at least 1 and at most 90"),
        ({"numbers": 91}, r"sums\(numbers\) is 91"),
        ({"largest": 0}, r"sums\(largest\) is 0; it must be at least 1 and at most 9"),
        ({"largest": 10}, r"sums\(largest\) is 10"),
        ({"terms": 0}, r"sums\(terms\) is 0; it must be at least 1 and at most 24"),
        ({"numbers": 5, "terms": 6}, r"sums\(terms\) is 6; it must be at least 1 and at most 5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Sums(**arguments)
