"""Recall: several of many facts in one answer (MQAR, arXiv 2312.04927; RULER's multi-query needles, 2404.06654).

[FACT]<k><v><w>[FACT] ... filler ...        [ASK]<a><b><c><d>[ANS]        <a><v><w><b><v><w> ... [END]
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_VALUES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Asks for several of many facts.

    Attributes:
      tokens: of context and question together; what facts and question leave is filler.
      facts: how many there are, 1 to 90.
      queries: how many are asked for, at most `facts`.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 192
    facts: int = 24
    queries: int = 4

    def __post_init__(self):
        check_between("recall(facts)", self.facts, 1, NUM_SYMBOLS - NUM_DIGITS)
        check_between("recall(queries)", self.queries, 1, self.facts)

    @property
    def new_tokens(self) -> int:
        """A key and its values a query, and the end."""
        return (1 + _VALUES) * self.queries + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Recall":
        """Random settings; context, question and answer take at most `tokens`."""
        queries = int(rng.integers(1, 1 + min(8, tokens // 12)))
        room = tokens - (1 + _VALUES) * queries - 1
        most = min(NUM_SYMBOLS - NUM_DIGITS, (room - 2 - queries) // (2 + _VALUES))
        facts = int(rng.integers(max(most // 2, queries), most + 1))
        return cls(tokens=room, facts=facts, queries=queries)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        keys = draw_keys(rng, self.facts)
        values = rng.integers(0, NUM_SYMBOLS, size=(self.facts, _VALUES)).tolist()
        pieces = [spell("[FACT]", key, *value) for key, value in zip(keys, values, strict=True)]
        filler = self.tokens - (2 + self.queries) - (2 + _VALUES) * self.facts
        check_fits(self, self.tokens - filler)
        turns = []
        for _ in range(1 + more):
            asked = rng.permutation(self.facts)[: self.queries].tolist()
            answer = [number for one in asked for number in (keys[one], *values[one])]
            turns.append((spell("[ASK]", *(keys[one] for one in asked), "[ANS]"), spell(*answer, "[END]")))
        return Example(
            context=scatter(pieces, filler, rng, material.filler),
            question=turns[0][0],
            answer=turns[0][1],
            more=tuple(turns[1:]),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("recall", Recall)
