"""The last write counts."""

from collections import Counter

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.variables import Variables
from tests.puzzles import MATERIAL, asked, check_answers, said, some_examples, statements

CONTEXT = "[SET]<20><7>Long ago[SET]<30><1>[SET]<20><9> it was[SET]<40><7>. [SET]<30><2>"
EXAMPLE = Example(context=CONTEXT, question="[GET]<20>", answer="<9>[END]")


def answer_of(context, question):
    value = {}
    for name, written in statements(context, "[SET]"):
        value[name] = written
    (name,) = asked(question, "[GET]")
    return said([value[name]])


def test_what_was_written_last_is_the_answer():
    check_answers([EXAMPLE, *some_examples(Variables())], answer_of)


def test_stale_values_score_nothing():
    assert Variables().score("<9>[END]", EXAMPLE) == 1.0
    wrong = ["", "<7>[END]", "<2>[END]", "<9>", "<20><9>[END]", "<9><9>[END]"]
    assert [Variables().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_further_questions_are_about_the_same_writes():
    example = Variables().example(np.random.default_rng(0), MATERIAL, more=20)
    assert len(example.more) == 20
    assert len({question for question, _ in example.more}) > 5
    check_answers([example], answer_of)


def test_each_name_is_written_and_writes_are_as_many_as_asked_for():
    for example in some_examples(Variables(names=5, writes=20)):
        writes = Counter(name for name, _ in statements(example.context, "[SET]"))
        assert (len(writes), writes.total()) == (5, 20)
        assert set(asked(example.question, "[GET]")) <= set(writes)


def test_the_first_write_is_often_stale():
    stale = 0
    for example in some_examples(Variables(names=5, writes=20)):
        (name,) = asked(example.question, "[GET]")
        first = next(value for one, value in statements(example.context, "[SET]") if one == name)
        stale += said([first]) != example.answer
    assert stale > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": 0}, r"variables\(names\) is 0; it must be at least 1 and at most 90"),
        ({"names": 91}, r"variables\(names\) is 91"),
        ({"names": 12, "writes": 11}, r"variables\(writes\) is 11; it must be at least 12"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Variables(**arguments)
