"""One fact among others: who reads the context finds the answer."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.needle import Needle
from tests.puzzles import MATERIAL, asked, check_answers, filler_of, said, some_examples, statements

CONTEXT = "Ada hid the key.[FACT]<17><5><60> The door [FACT]<42><8><7>was red. "
EXAMPLE = Example(context=CONTEXT, question="[ASK]<42>", answer="<8><7>[END]")


def answer_of(context, question):
    (key,) = asked(question, "[ASK]")
    (fact,) = [fact for fact in statements(context, "[FACT]") if fact[0] == key]
    return said(fact[1:])


def test_the_fact_that_is_asked_for_is_the_answer():
    assert answer_of(CONTEXT, EXAMPLE.question) == EXAMPLE.answer
    check_answers([EXAMPLE, *some_examples(Needle(tokens=200, facts=6))], answer_of)


def test_only_the_whole_answer_scores():
    assert Needle().score("<8><7>[END]", EXAMPLE) == 1.0
    wrong = ["", "<8><7>", "<8><9>[END]", "<5><60>[END]", "<8><7><7>[END]", "<42><8><7>[END]", " <8><7>[END]"]
    assert [Needle().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_further_questions_ask_for_other_facts():
    example = Needle(tokens=100, facts=6).example(np.random.default_rng(0), MATERIAL, more=20)
    check_answers([example], answer_of)
    assert len(example.more) == 20
    assert len({question for question, _ in example.more}) > 1


def test_keys_differ_and_facts_are_as_many_as_asked_for():
    for example in some_examples(Needle(tokens=200, facts=32)):
        keys = [fact[0] for fact in statements(example.context, "[FACT]")]
        assert len(keys) == len(set(keys)) == 32
        assert min(keys) >= 10  # digits are no keys


@pytest.mark.parametrize("facts", [1, 4])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_the_needle_lies_at_its_depth(depth, facts):
    task = Needle(tokens=102 + 4 * facts, depth=depth, facts=facts)
    for example in some_examples(task):
        (key,) = asked(example.question, "[ASK]")
        before, _ = example.context.split(f"[FACT]<{key}>")
        assert len(filler_of(before)) == 100 * depth
        assert example.facts == {"depth": depth, "tokens": task.tokens}


def test_a_needle_without_a_depth_lies_anywhere():
    depths = [example.facts["depth"] for example in some_examples(Needle(tokens=64), count=40)]
    assert all(0 <= depth < 1 for depth in depths)
    assert min(depths) < 0.2
    assert max(depths) > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": 0}, r"needle\(facts\) is 0; it must be at least 1 and at most 32. The nearest is 1."),
        ({"facts": 33}, r"needle\(facts\) is 33"),
        ({"depth": 1.5}, r"needle\(depth\) is 1.5; it must be at least -1.0 and at most 1.0"),
        ({"depth": float("nan")}, r"needle\(depth\) is nan"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Needle(**arguments)
