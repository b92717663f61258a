"""A number of five digits, the only fact."""

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.passkey import Passkey
from tests.puzzles import asked, check_answers, filler_of, said, some_examples, statements

CONTEXT = "The mill was[FACT]<55><3><1><4><0><5> old. "
EXAMPLE = Example(context=CONTEXT, question="[ASK]<55>", answer="<3><1><4><0><5>[END]")


def answer_of(context, question):
    (fact,) = statements(context, "[FACT]")
    assert asked(question, "[ASK]") == fact[:1]
    return said(fact[1:])


def test_the_number_is_the_answer():
    check_answers([EXAMPLE, *some_examples(Passkey(tokens=100))], answer_of)


def test_only_the_whole_answer_scores():
    assert Passkey().score("<3><1><4><0><5>[END]", EXAMPLE) == 1.0
    wrong = ["", "<3><1><4><0>[END]", "<3><1><4><5><0>[END]", "<55><3><1><4><0><5>[END]", "31405"]
    assert [Passkey().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_five_digits_that_differ():
    for example in some_examples(Passkey(tokens=100)):
        ((key, *digits),) = statements(example.context, "[FACT]")
        assert len(digits) == len(set(digits)) == 5
        assert max(digits) < 10 <= key


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_number_lies_at_its_depth(depth):
    for example in some_examples(Passkey(tokens=109, depth=depth)):
        before, after = example.context.split("[FACT]")
        assert (len(before), len(filler_of(after))) == (100 * depth, 100 - 100 * depth)
        assert example.facts == {"depth": depth, "tokens": 109}


def test_a_number_without_a_depth_lies_anywhere():
    depths = [example.facts["depth"] for example in some_examples(Passkey(tokens=64), count=40)]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


@pytest.mark.parametrize("depth", [-1.5, 2.0])
def test_refusals(depth):
    with pytest.raises(UserError, match=rf"passkey\(depth\) is {depth}; it must be at least -1.0 and at most 1.0"):
        Passkey(depth=depth)
