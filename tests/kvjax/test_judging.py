"""The cheap judge: a policy is right where it would have generated what the uncompressed cache did."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from kvjax.evaluation import Cell
from kvjax.forcing import compare
from kvjax.generation import Generator
from kvjax.grammar import parse_policy
from kvjax.judging import Judge, halves
from kvjax.policy import Policy
from kvjax.task import Example, Task
from kvjax.text import Tokenizer
from kvjax.walk import follow
from tests.tiny import tiny_model

PROMPTS = [np.random.default_rng(row).integers(1, 64, size=40 + row).tolist() for row in range(4)]
GIVEN = [np.random.default_rng(9 + row).integers(1, 64, size=6).tolist() for row in range(4)]
COARSE = "int2+exact(sinks=0,window=0,round=8)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts(Task):
    """Half right if there are six letters; an example may be hopeless."""

    name: ClassVar[str] = "counts"

    @property
    def new_tokens(self):
        return 6

    def score(self, output, example):
        return 0.0 if example.answer == "hopeless" else 0.5 * (len(output) == 6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads(Counts):
    """Given text."""

    name: ClassVar[str] = "reads"
    forced: ClassVar[bool] = True


class Letters(Tokenizer):
    """One letter a token."""

    stop_tokens = ()

    def __init__(self):
        pass

    def decode(self, tokens):
        return "".join(chr(64 + token) for token in tokens)


def cell(task):
    answers = ["fine", "fine", "fine", "hopeless"]
    examples = tuple(Example(context="", question="", answer=answer) for answer in answers)
    named = {"question": "inside", "examples": examples, "prompts": PROMPTS, "then": [], "answers": GIVEN}
    return Cell(task=task, max_tokens=128, **named)


def generated(policy):
    return Generator(tiny_model(), policy=policy, batch=4, max_tokens=128).generate(PROMPTS, max_new_tokens=6)


@pytest.mark.slow
def test_rows_count_if_the_policy_would_have_generated_them_and_given_texts_by_agreement():
    judge = Judge(tiny_model(), Letters(), [cell(Counts()), cell(Reads())], statistics=None, batch=8)
    full = judge(Policy())
    assert (full.accuracy, full.kl, full.step) == ((0.375 + 1.0) / 2, 0.0, 1 / 8)
    coarse = judge(parse_policy(COARSE))
    same = [one == other for one, other in zip(generated(COARSE), generated("full"), strict=True)]
    assert not all(same[:3])
    assert coarse.tasks["counts, inside"]["accuracy"] == 0.5 * sum(same[:3]) / 4
    followed = [
        follow(tiny_model(), parse_policy(text), PROMPTS, answers=GIVEN, max_tokens=128) for text in ("full", COARSE)
    ]
    wanted = compare(*followed)
    assert coarse.tasks["reads, inside"]["accuracy"] == pytest.approx(wanted["top1_agreement"])
    assert coarse.tasks["reads, inside"]["kl"] == pytest.approx(wanted["kl_mean"])


def test_halves_share_no_example():
    first, second = halves(cell(Counts()))
    assert (first.prompts, second.prompts) == (PROMPTS[:2], PROMPTS[2:])
    assert (first.answers, second.answers) == (GIVEN[:2], GIVEN[2:])
    assert (first.examples + second.examples, first.then, second.max_tokens) == (cell(Counts()).examples, [], 128)
