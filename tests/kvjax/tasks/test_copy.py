"""A run of symbols, said again."""

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.copy import Copy
from tests.puzzles import asked, check_answers, filler_of, said, some_examples, statements

CONTEXT = "Rosa [CPY]<33><12><90>lent a spoon. "
EXAMPLE = Example(context=CONTEXT, question="[OUT]", answer="<33><12><90>[END]")


def answer_of(context, question):
    assert asked(question, "[OUT]") == []
    (run,) = statements(context, "[CPY]")
    return said(run)


def test_the_run_is_the_answer():
    check_answers([EXAMPLE, *some_examples(Copy())], answer_of)


def test_only_the_whole_run_scores():
    assert Copy().score("<33><12><90>[END]", EXAMPLE) == 1.0
    wrong = [
        "",
        "<33><12>[END]",
        "<33><90><12>[END]",
        "<33><12><90>",
        "<33><12><90><90>[END]",
        "[CPY]<33><12><90>[END]",
    ]
    assert [Copy().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize("length", [1, 48, 90])
def test_symbols_differ_and_are_as_many_as_asked_for(length):
    for example in some_examples(Copy(tokens=length + 22, length=length)):
        (run,) = statements(example.context, "[CPY]")
        assert len(run) == len(set(run)) == length
        assert len(filler_of(example.context)) == 20


@pytest.mark.parametrize("length", [0, 91])
def test_refusals(length):
    with pytest.raises(UserError, match=rf"copy\(length\) is {length}; it must be at least 1 and at most 90"):
        Copy(length=length)
