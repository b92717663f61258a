"""Hops: pointers to be followed to the end of a chain, other chains being in the way (arXiv 2604.17935).

[PTR]<a><b> ... [PTR]<c><d> ... [PTR]<b><c> ...        [HOP]<a>        <b><c><d>[END]
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import UserError, check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hops(Task):
    """Asks where a chain of pointers leads.

    Attributes:
      tokens: of context and question together; what pointers and question leave is filler.
      hops: pointers of each chain.
      chains: how many there are; one is asked for.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 192
    hops: int = 8
    chains: int = 4

    def __post_init__(self):
        check_between("hops(hops)", self.hops, 1, NUM_SYMBOLS - NUM_DIGITS - 1)
        check_between("hops(chains)", self.chains, 1, NUM_SYMBOLS - NUM_DIGITS)
        nodes = self.chains * (self.hops + 1)
        if nodes > NUM_SYMBOLS - NUM_DIGITS:
            raise UserError(f"{self.chains} chains of {self.hops} hops take {nodes} keys; there are 90: lower one.")

    @property
    def new_tokens(self) -> int:
        """The nodes behind the first, and the end."""
        return self.hops + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Hops":
        """Random settings; context, question and answer take at most `tokens`."""
        keys = NUM_SYMBOLS - NUM_DIGITS
        hops = int(rng.integers(1, 1 + min((tokens - 5) // 4, 16)))
        room = tokens - hops - 1
        most = min((room - 2) // (3 * hops), keys // (hops + 1))
        return cls(tokens=room, hops=hops, chains=int(rng.integers((most + 1) // 2, most + 1)))

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        nodes = np.reshape(draw_keys(rng, self.chains * (self.hops + 1)), (self.chains, -1)).tolist()
        pieces = [spell("[PTR]", *pair) for chain in nodes for pair in zip(chain, chain[1:], strict=False)]
        filler = self.tokens - 2 - 3 * len(pieces)
        check_fits(self, self.tokens - filler)
        shuffled = [pieces[one] for one in rng.permutation(len(pieces))]
        asked = [0, *(int(one) for one in rng.integers(0, self.chains, size=more))]
        turns = [(spell("[HOP]", nodes[one][0]), spell(*nodes[one][1:], "[END]")) for one in asked]
        return Example(
            context=scatter(shuffled, filler, rng, material.filler),
            question=turns[0][0],
            answer=turns[0][1],
            facts={"hops": self.hops},
            more=tuple(turns[1:]),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("hops", Hops)
