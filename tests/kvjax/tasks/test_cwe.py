"""Common words, counted again."""

import collections
import re

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.cwe import Cwe
from tests.wordings import CHAT, MATERIAL, size, some_examples

EXAMPLE = Example(context="", question="", answer="old-lamp, rusty-violin")


@pytest.mark.parametrize("task", [Cwe(), Cwe(tokens=600, num_cw=3, freq_cw=20, freq_ucw=2)])
@pytest.mark.parametrize("material", [MATERIAL, CHAT])
def test_the_answer_is_what_comes_most_often(task, material):
    for example in some_examples(task, material=material, count=2):
        entries = re.findall(r"(\d+)\. (\w+-[\w-]+)", example.context)
        assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
        counts = collections.Counter(word for _, word in entries)
        common = set(example.answer.split(", "))
        assert len(common) == task.num_cw
        assert {word for word, count in counts.items() if count == task.freq_cw} == common
        assert {count for word, count in counts.items() if word not in common} == {task.freq_ucw}
        assert len(counts) - len(common) == example.facts["uncommon"] > 0
        assert task.tokens - 30 < size(example) == example.facts["tokens"] <= task.tokens


def test_the_words_are_mixed():
    entries = re.findall(r"\d+\. ([\w-]+)", some_examples(Cwe())[0].context)
    assert sum(one == other for one, other in zip(entries, entries[1:], strict=False)) < len(entries) / 5


def test_scores_are_the_share_of_right_words():
    score = Cwe(num_cw=2).score
    assert score("1. Rusty-violin\n2. old-lamp", EXAMPLE) == 1.0
    assert score("old-lamp, lamp", EXAMPLE) == 0.5
    assert score("violin, very-old-lamp", EXAMPLE) == 0.0
    assert score("", EXAMPLE) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_cw": 0}, r"cwe\(num_cw\) is 0; it must be at least 1"),
        ({"freq_cw": 1}, r"cwe\(freq_cw\) is 1; it must be at least 2"),
        ({"freq_cw": 3}, r"cwe\(freq_ucw\) is 3; it must be at least 1 and at most 2"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Cwe(**arguments)
