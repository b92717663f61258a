"""Several facts in one answer, in the order in which they are asked for."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.recall import Recall
from tests.puzzles import MATERIAL, asked, check_answers, said, some_examples, statements

CONTEXT = "[FACT]<20><1><2>Tom sold[FACT]<30><3><4> a kite[FACT]<40><5><6>. "
EXAMPLE = Example(context=CONTEXT, question="[ASK]<40><20>[ANS]", answer="<40><5><6><20><1><2>[END]")


def answer_of(context, question):
    facts = {key: [key, *values] for key, *values in statements(context, "[FACT]")}
    return said([number for key in asked(question, "[ASK]", end="[ANS]") for number in facts[key]])


def test_the_facts_that_are_asked_for_are_the_answer():
    check_answers([EXAMPLE, *some_examples(Recall())], answer_of)


def test_only_the_whole_answer_in_its_order_scores():
    assert Recall().score("<40><5><6><20><1><2>[END]", EXAMPLE) == 1.0
    wrong = ["", "<20><1><2><40><5><6>[END]", "<40><5><6>[END]", "<40><5><6><20><1><3>[END]", "<40><5><6><20><1><2>"]
    assert [Recall().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_further_questions_are_about_the_same_facts():
    example = Recall().example(np.random.default_rng(0), MATERIAL, more=5)
    assert len({question for question, _ in example.more}) == 5
    check_answers([example], answer_of)


def test_keys_and_questions_are_as_many_as_asked_for_and_differ():
    for example in some_examples(Recall(tokens=400, facts=90, queries=7)):
        keys = [fact[0] for fact in statements(example.context, "[FACT]")]
        assert sorted(keys) == list(range(10, 100))
        assert len(set(asked(example.question, "[ASK]", end="[ANS]"))) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": 0}, r"recall\(facts\) is 0; it must be at least 1 and at most 90"),
        ({"facts": 91}, r"recall\(facts\) is 91"),
        ({"queries": 0}, r"recall\(queries\) is 0; it must be at least 1 and at most 24"),
        ({"facts": 3, "queries": 4}, r"recall\(queries\) is 4; it must be at least 1 and at most 3"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Recall(**arguments)
