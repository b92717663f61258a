"""Variables: what was written last counts; what was overwritten is stale, and wrong.

[SET]<x><v> ... [SET]<x><w> ...        [GET]<x><y>[ANS]        <x><w><y><...>[END]
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variables(Task):
    """Asks for the newest values of some variables.

    Attributes:
      tokens: of context and question together; what writes and question leave is filler.
      names: variables.
      writes: how often one of them is written, at least once each.
      queries: how many are asked for, at most `names`.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 192
    names: int = 12
    writes: int = 36
    queries: int = 2

    def __post_init__(self):
        check_between("variables(names)", self.names, 1, NUM_SYMBOLS - NUM_DIGITS)
        check_between("variables(writes)", self.writes, self.names, 1 << 20)
        check_between("variables(queries)", self.queries, 1, self.names)

    @property
    def new_tokens(self) -> int:
        """Name and value a query, and the end."""
        return 2 * self.queries + 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Variables":
        """Random settings; context, question and answer take at most `tokens`."""
        queries = int(rng.integers(1, 1 + min(4, tokens // 16)))
        room = tokens - 2 * queries - 1
        most = (room - 2 - queries) // 3
        writes = int(rng.integers(most // 3, most + 1))
        names = min(max(writes // 3, queries), NUM_SYMBOLS - NUM_DIGITS)
        return cls(tokens=room, names=names, writes=max(writes, names), queries=queries)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        names = draw_keys(rng, self.names)
        again = rng.integers(0, self.names, size=self.writes - self.names)
        order = rng.permutation(np.concatenate([np.arange(self.names), again]))
        written = rng.integers(0, NUM_SYMBOLS, size=self.writes).tolist()
        newest = {names[one]: value for one, value in zip(order, written, strict=True)}
        pieces = [spell("[SET]", names[one], value) for one, value in zip(order, written, strict=True)]
        filler = self.tokens - (2 + self.queries) - 3 * self.writes
        check_fits(self, self.tokens - filler)
        turns = []
        for _ in range(1 + more):
            asked = [names[one] for one in rng.permutation(self.names)[: self.queries]]
            answer = [number for name in asked for number in (name, newest[name])]
            turns.append((spell("[GET]", *asked, "[ANS]"), spell(*answer, "[END]")))
        return Example(
            context=scatter(pieces, filler, rng, material.filler),
            question=turns[0][0],
            answer=turns[0][1],
            more=tuple(turns[1:]),
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the answer, to the letter."""
        return float(output == example.answer)


TASKS.register("variables", Variables)
