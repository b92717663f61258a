"""Pointers, followed to the end."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.hops import Hops
from tests.puzzles import MATERIAL, asked, check_answers, numbers, said, some_examples, statements

CONTEXT = "[PTR]<12><13>Nobody[PTR]<50><51> sold[PTR]<11><12>[PTR]<51><52> it. "
EXAMPLE = Example(context=CONTEXT, question="[HOP]<11>", answer="<12><13>[END]")


def answer_of(context, question):
    leads_to = dict(statements(context, "[PTR]"))
    (node,) = asked(question, "[HOP]")
    path = [node]
    while path[-1] in leads_to:
        path.append(leads_to[path[-1]])
    return said(path[1:])


def test_the_nodes_of_the_chain_are_the_answer():
    check_answers([EXAMPLE, *some_examples(Hops()), *some_examples(Hops(hops=1, chains=45))], answer_of)


def test_only_the_whole_chain_scores():
    assert Hops().score("<12><13>[END]", EXAMPLE) == 1.0
    wrong = ["", "<13>[END]", "<12>[END]", "<12><13>", "<51><52>[END]", "<12><13><50>[END]", "<11><12><13>[END]"]
    assert [Hops().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_further_questions_follow_other_chains():
    example = Hops().example(np.random.default_rng(0), MATERIAL, more=20)
    assert len(example.more) == 20
    assert len({question for question, _ in example.more}) == 4
    check_answers([example], answer_of)


def test_chains_are_apart_and_as_long_as_asked_for():
    for example in some_examples(Hops(hops=5, chains=3)):
        pointers = statements(example.context, "[PTR]")
        sources, targets = zip(*pointers, strict=True)
        assert len(pointers) == len(set(sources)) == len(set(targets)) == 15
        assert len(set(sources) - set(targets)) == 3
        assert len(numbers(example.answer)) == 5
        assert example.facts == {"hops": 5}


def test_pointers_are_in_no_order():
    examples = some_examples(Hops(hops=5, chains=1))
    ordered = [[b for _, b in statements(one.context, "[PTR]")] == numbers(one.answer) for one in examples]
    assert sum(ordered) < 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hops": 0}, r"hops\(hops\) is 0; it must be at least 1 and at most 89"),
        ({"chains": 0}, r"hops\(chains\) is 0; it must be at least 1 and at most 90"),
        ({"hops": 45, "chains": 2}, "2 chains of 45 hops take 92 keys; there are 90: lower one"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Hops(**arguments)


def test_all_keys_in_one_chain():
    (example,) = some_examples(Hops(tokens=300, hops=89, chains=1), count=1)
    assert sorted(numbers(example.question + example.answer)) == list(range(10, 100))
