"""A fact from long before the question."""

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.dormant import Dormant
from tests.puzzles import asked, check_answers, filler_of, said, some_examples, statements

CONTEXT = "[FACT]<61><14><99>Once [FACT]<77><2><35>"
EXAMPLE = Example(context=CONTEXT, question="Ivo fixed the clock. [ASK]<61>", answer="<14><99>[END]")


def answer_of(context, question):
    (key,) = asked(question, "[ASK]")
    (fact,) = [fact for fact in statements(context, "[FACT]") if fact[0] == key]
    return said(fact[1:])


def test_the_fact_that_is_asked_for_is_the_answer():
    check_answers([EXAMPLE, *some_examples(Dormant(tokens=160, distance=100))], answer_of)


def test_only_the_whole_answer_scores():
    assert Dormant().score("<14><99>[END]", EXAMPLE) == 1.0
    wrong = ["", "<2><35>[END]", "<14>[END]", "<99><14>[END]", "<14><99>", "<61><14><99>[END]"]
    assert [Dormant().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("distance", [0, 1, 300])
def test_other_text_lies_between_the_facts_and_the_question(distance):
    for example in some_examples(Dormant(tokens=distance + 50, distance=distance)):
        stretch, _ = example.question.split("[ASK]")
        assert len(stretch) == distance
        assert filler_of(stretch) == stretch
        assert len(filler_of(example.context)) == 50 - 2 - 8 * 4
        assert example.facts == {"distance": distance}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"facts": 0}, r"dormant\(facts\) is 0; it must be at least 1 and at most 32"),
        ({"facts": 33}, r"dormant\(facts\) is 33"),
        ({"tokens": 640, "distance": -1}, r"dormant\(distance\) is -1; it must be at least 0 and below tokens=640"),
        ({"tokens": 640, "distance": 640}, r"dormant\(distance\) is 640; it must be at least 0 and below tokens=640"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Dormant(**arguments)
