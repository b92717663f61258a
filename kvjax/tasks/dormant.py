"""Dormant: facts that are stated once and asked for after a long while in which nobody looks at them.

    [FACT]<k><v><w> ...        a long stretch of other text ... [ASK]<k>        <v><w>[END]

The stretch belongs to the question: where a cache is compressed before the question, it passes token by token, and with
it many rounds of compression. It is the case in which decode-time eviction loses what it will need.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import UserError, check_between
from kvjax.symbols import NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_VALUES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dormant(Task):
    """Asks for a fact from long ago.

    Attributes:
      tokens: of context and question together.
      distance: of these, tokens of other text between the context and the question itself.
      facts: how many there are, 1 to 32.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 500
    distance: int = 400
    facts: int = 8

    def __post_init__(self):
        check_between("dormant(facts)", self.facts, 1, 32)
        if not 0 <= self.distance < self.tokens:
            raise UserError(
                f"dormant(distance) is {self.distance}; it must be at least 0 and below tokens={self.tokens}."
            )

    @property
    def new_tokens(self) -> int:
        """Values and the end."""
        return _VALUES + 1

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        keys = draw_keys(rng, self.facts)
        values = rng.integers(0, NUM_SYMBOLS, size=(self.facts, _VALUES)).tolist()
        pieces = [spell("[FACT]", key, *value) for key, value in zip(keys, values, strict=True)]
        filler = self.tokens - 2 - self.distance - (2 + _VALUES) * self.facts
        check_fits(self, self.tokens - filler)
        return Example(
            context=scatter(pieces, filler, rng, material.filler),
            question=material.filler(rng, self.distance) + spell("[ASK]", keys[0]),
            answer=spell(*values[0], "[END]"),
            facts={"distance": self.distance},
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("dormant", Dormant)
