"""Copy: a run of different symbols, to be said again.

... [CPY]<a><b><c> ...        [OUT]        <a><b><c>[END]
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """Asks for all that was said.

    Attributes:
      tokens: of context and question together; what the run and the question leave is filler around it.
      length: symbols of the run.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 128
    length: int = 48

    def __post_init__(self):
        check_between("copy(length)", self.length, 1, NUM_SYMBOLS - NUM_DIGITS)

    @property
    def new_tokens(self) -> int:
        """The run and the end."""
        return self.length + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Copy":
        """Random settings; context, question and answer take at most `tokens`."""
        length = int(rng.integers(4, 1 + min(NUM_SYMBOLS - NUM_DIGITS, tokens // 2 - 2)))
        return cls(tokens=tokens - length - 1, length=length)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        run = draw_keys(rng, self.length)
        filler = self.tokens - 2 - self.length
        check_fits(self, self.tokens - filler)
        return Example(
            context=scatter([spell("[CPY]", *run)], filler, rng, material.filler),
            question=spell("[OUT]"),
            answer=spell(*run, "[END]"),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("copy", Copy)
