"""Sums: a chain of arithmetic over numbers that lie about; each step looks one up and adds it, modulo 10.

    [NUM]<a><3> ... [NUM]<b><4> ...        [SUM]<a><b><c>[ANS]        <a><3><3><b><4><7><c> ... [END]

A step says the number's name, the number, and the sum so far.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums(Task):
    """Asks for the running sums of some numbers.

    Attributes:
      tokens: of context and question together; what numbers and question leave is filler.
      numbers: how many there are.
      terms: how many are added, at most `numbers`.
      largest: of the numbers, 1 to 9; the small model has learned those up to 4.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 192
    numbers: int = 24
    terms: int = 8
    largest: int = 4

    def __post_init__(self):
        check_between("sums(numbers)", self.numbers, 1, NUM_SYMBOLS - NUM_DIGITS)
        check_between("sums(terms)", self.terms, 1, self.numbers)
        check_between("sums(largest)", self.largest, 1, NUM_DIGITS - 1)

    @property
    def new_tokens(self) -> int:
        """Name, number and sum a term, and the end."""
        return 3 * self.terms + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Sums":
        """Random settings; context, question and answer take at most `tokens`."""
        terms = int(rng.integers(1, 1 + min(12, tokens // 8)))
        room = tokens - 3 * terms - 1
        most = min(NUM_SYMBOLS - NUM_DIGITS, (room - 2 - terms) // 3)
        return cls(tokens=room, numbers=int(rng.integers(terms, most + 1)), terms=terms)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        keys = draw_keys(rng, self.numbers)
        digits = rng.integers(0, self.largest + 1, size=self.numbers).tolist()
        pieces = [spell("[NUM]", key, digit) for key, digit in zip(keys, digits, strict=True)]
        filler = self.tokens - (2 + self.terms) - 3 * self.numbers
        check_fits(self, self.tokens - filler)
        turns = []
        for _ in range(1 + more):
            asked = rng.permutation(self.numbers)[: self.terms].tolist()
            sums = np.cumsum([digits[one] for one in asked]) % NUM_DIGITS
            answer = [
                part for one, total in zip(asked, sums, strict=True) for part in (keys[one], digits[one], int(total))
            ]
            turns.append((spell("[SUM]", *(keys[one] for one in asked), "[ANS]"), spell(*answer, "[END]")))
        return Example(
            context=scatter(pieces, filler, rng, material.filler),
            question=turns[0][0],
            answer=turns[0][1],
            facts={"terms": self.terms},
            more=tuple(turns[1:]),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("sums", Sums)
