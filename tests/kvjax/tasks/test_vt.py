"""Variables in words, followed again by reading the text in order."""

import re

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.vt import Vt
from tests.wordings import CHAT, MATERIAL, size, some_examples

EXAMPLE = Example(context="", question="", answer="AAAAA, BBBBB, CCCCC, DDDDD")


def assigned(text):
    """Variable -> value, assignments carried out in order."""
    values = {}
    for name, what in re.findall(r"Let ([A-Z]{5}) be (\w+)\.", text):
        assert name not in values
        values[name] = values[what] if what.isalpha() else what
    return values


@pytest.mark.parametrize("task", [Vt(tokens=300), Vt(tokens=500, chains=4, hops=6), Vt(tokens=300, hops=1)])
@pytest.mark.parametrize("material", [MATERIAL, CHAT])
def test_the_answer_is_what_the_assignments_come_to(task, material):
    for example in some_examples(task, material=material):
        values = assigned(example.context)
        (wanted,) = re.findall(r"the value (\d+)", example.question)
        assert set(example.answer.split(", ")) == {name for name, value in values.items() if value == wanted}
        assert len(values) == task.chains * (task.hops + 1)
        assert len(set(values.values())) == task.chains
        assert f"There are {task.hops + 1} of them" in example.question
        assert task.tokens - 60 < size(example) == example.facts["tokens"] <= task.tokens


def test_chains_are_spread_over_the_text():
    spread = [
        example.context.rindex("Let ") - example.context.index("Let ") for example in some_examples(Vt(tokens=1000))
    ]
    assert max(spread) > 2000


def test_scores_are_the_share_of_right_names():
    score = Vt(hops=3).score
    assert score("AAAAA, BBBBB, CCCCC and DDDDD.", EXAMPLE) == 1.0
    assert score("ddddd aaaaa", EXAMPLE) == 0.5
    assert score("AAAAAA", EXAMPLE) == 0.0
    assert score("", EXAMPLE) == 0.0


@pytest.mark.parametrize("arguments", [{"chains": 0}, {"hops": 0}, {"hops": 65}, {"chains": 65}])
def test_refusals(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(UserError, match=rf"vt\({name}\) is {value}; it must be at least 1 and at most 64"):
        Vt(**arguments)
