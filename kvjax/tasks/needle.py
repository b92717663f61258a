"""Needle: a fact among filler, at a depth and a length of one's choice (RULER's niah, arXiv 2404.06654).

    ... [FACT]<k><v><w> ... [FACT] ...        [ASK]<k>        <v><w>[END]

Further facts with other keys are distractors.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_VALUES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Asks for one of a few facts in a long text.

    Attributes:
      tokens: of context and question together.
      depth: where the fact lies, 0 (first) to 1 (last); below 0 for anywhere.
      facts: how many there are, 1 to 32.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 500
    depth: float = -1.0
    facts: int = 4

    def __post_init__(self):
        check_between("needle(facts)", self.facts, 1, 32)
        check_between("needle(depth)", self.depth, -1.0, 1.0)

    @property
    def new_tokens(self) -> int:
        """Values and the end."""
        return _VALUES + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Needle":
        """Random settings; context, question and answer take at most `tokens`."""
        return cls(tokens=tokens - _VALUES - 1, facts=int(rng.integers(1, 1 + min(32, tokens // 8))))

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        keys = draw_keys(rng, self.facts)
        values = rng.integers(0, NUM_SYMBOLS, size=(self.facts, _VALUES)).tolist()
        pieces = [spell("[FACT]", key, *value) for key, value in zip(keys, values, strict=True)]
        filler = self.tokens - 2 - (2 + _VALUES) * self.facts
        check_fits(self, self.tokens - filler)
        depth = float(rng.random()) if self.depth < 0 else self.depth
        asked = [0, *(int(one) for one in rng.integers(0, self.facts, size=more))]
        turns = [(spell("[ASK]", keys[one]), spell(*values[one], "[END]")) for one in asked]
        return Example(
            context=scatter(pieces, filler, rng, material.filler, depths={0: depth}),
            question=turns[0][0],
            answer=turns[0][1],
            facts={"depth": depth, "tokens": self.tokens},
            more=tuple(turns[1:]),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("needle", Needle)
