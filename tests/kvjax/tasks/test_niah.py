"""Needles in words, found again by reading the text."""

import re

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.niah import Niah
from tests.wordings import CHAT, MATERIAL, size, some_examples

EXAMPLE = Example(context="", question="", answer="1111111, 2222222")


def needles(text):
    return re.findall(r"The ([\w-]+) has the code (\d+)\. ?", text)


def asked(question):
    return re.findall(r"the (\w+-[\w-]+)", question)


@pytest.mark.parametrize(
    "task",
    [
        Niah(tokens=400),
        Niah(tokens=400, keys=4),
        Niah(tokens=400, values=4),
        Niah(tokens=600, keys=6, values=2, queries=4),
        Niah(tokens=400, haystack="repeat"),
        Niah(tokens=400, haystack="needles"),
    ],
)
@pytest.mark.parametrize("material", [MATERIAL, CHAT])
def test_the_answer_is_what_the_text_says_and_fills_its_tokens(task, material):
    for example in some_examples(task, material=material):
        found, names = needles(example.context), asked(example.question)
        assert len(names) == task.queries
        expected = [code for name in names for owner, code in found if owner == name]
        assert sorted(example.answer.split(", ")) == sorted(expected)
        assert len(expected) == task.queries * task.values
        assert len({code for _, code in found}) == len(found)
        assert task.tokens - 60 < size(example) == example.facts["tokens"] <= task.tokens
        if task.haystack != "needles":
            assert len(found) == task.keys * task.values


def test_haystacks():
    texts = {kind: some_examples(Niah(tokens=300, haystack=kind))[0].context for kind in ("needles", "repeat")}
    body = texts["needles"].split("\n\n")[1]
    assert len(needles(body)) > 15
    assert re.sub(r"The [\w-]+ has the code \d+\. ?", "", body) == ""
    assert texts["repeat"].count("The road is wet.") > 10


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("haystack", ["sentences", "needles"])
def test_the_needle_lies_at_its_depth(depth, haystack):
    for example in some_examples(Niah(tokens=1500, depth=depth, haystack=haystack)):
        body = example.context.split("\n\n")[1]
        place = body.index(f"The {asked(example.question)[0]} has")
        assert place / len(body) == pytest.approx(depth, abs=0.05)
        assert example.facts["depth"] == depth


def test_depths_without_an_argument_differ():
    depths = [example.facts["depth"] for example in some_examples(Niah(tokens=200), count=20)]
    assert min(depths) < 0.3
    assert max(depths) > 0.7


def test_scores_are_the_share_of_right_numbers():
    score = Niah(values=2).score
    assert score("The codes are 2222222 and 1111111.", EXAMPLE) == 1.0
    assert score("1111111, 3333333", EXAMPLE) == 0.5
    assert score("11111112222222", EXAMPLE) == 0.0
    assert score("", EXAMPLE) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1.5}, r"niah\(depth\) is 1.5; .* at most 1.0"),
        ({"keys": 0}, r"niah\(keys\) is 0; .* at least 1"),
        ({"keys": 2, "queries": 3}, r"niah\(queries\) is 3; .* at most 2"),
        ({"values": 17}, r"niah\(values\) is 17; .* at most 16"),
        ({"haystack": "needle"}, r"niah\(haystack\) is needle; .* The nearest is needles"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Niah(**arguments)
