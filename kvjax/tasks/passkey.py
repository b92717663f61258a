"""Passkey: a number of five digits among filler, the only fact there is (arXiv 2305.16300).

    ... [FACT]<k><3><1><4><0><5> ...        [ASK]<k>        <3><1><4><0><5>[END]

The digits of one number differ, so that each is followed by one other.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_DIGITS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """Asks for the number in a long text.

    Attributes:
      tokens: of context and question together.
      depth: where the number lies, 0 (first) to 1 (last); below 0 for anywhere.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 500
    depth: float = -1.0

    def __post_init__(self):
        check_between("passkey(depth)", self.depth, -1.0, 1.0)

    @property
    def new_tokens(self) -> int:
        """Digits and the end."""
        return _DIGITS + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Passkey":
        """Random settings; context, question and answer take at most `tokens`."""
        del rng
        return cls(tokens=tokens - _DIGITS - 1)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        (key,) = draw_keys(rng, 1)
        digits = rng.permutation(NUM_DIGITS)[:_DIGITS].tolist()
        piece = spell("[FACT]", key, *digits)
        filler = self.tokens - 2 - 2 - _DIGITS
        check_fits(self, self.tokens - filler)
        depth = float(rng.random()) if self.depth < 0 else self.depth
        return Example(
            context=scatter([piece], filler, rng, material.filler, depths={0: depth}),
            question=spell("[ASK]", key),
            answer=spell(*digits, "[END]"),
            facts={"depth": depth, "tokens": self.tokens},
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("passkey", Passkey)
