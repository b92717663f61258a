"""Variables: what was written last counts; what was overwritten is stale, and wrong.

[SET]<x><v> ... [SET]<x><w> ...        [GET]<x>        <w>[END]

Ask it after the context has been compressed: the first token of an answer comes from the prefill, where a prompt
attends over itself uncompressed, and here it is the whole answer.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variables(Task):
    """Asks for the newest value of a variable.

    Attributes:
      tokens: of context and question together; what writes and question leave is filler.
      names: variables.
      writes: how often one of them is written, at least once each.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 192
    names: int = 12
    writes: int = 36

    def __post_init__(self):
        check_between("variables(names)", self.names, 1, NUM_SYMBOLS - NUM_DIGITS)
        check_between("variables(writes)", self.writes, self.names, 1 << 20)

    @property
    def new_tokens(self) -> int:
        """The value and the end."""
        return 2

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Variables":
        """Random settings; context, question and answer take at most `tokens`."""
        room = tokens - 2
        most = (room - 2) // 3
        writes = int(rng.integers(most // 3, most + 1))
        names = min(max(writes // 3, 1), NUM_SYMBOLS - NUM_DIGITS)
        return cls(tokens=room, names=names, writes=max(writes, names))

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        names = draw_keys(rng, self.names)
        again = rng.integers(0, self.names, size=self.writes - self.names)
        order = rng.permutation(np.concatenate([np.arange(self.names), again]))
        written = rng.integers(0, NUM_SYMBOLS, size=self.writes).tolist()
        newest = {names[one]: value for one, value in zip(order, written, strict=True)}
        pieces = [spell("[SET]", names[one], value) for one, value in zip(order, written, strict=True)]
        filler = self.tokens - 2 - 3 * self.writes
        check_fits(self, self.tokens - filler)
        asked = [names[int(one)] for one in rng.integers(0, self.names, size=1 + more)]
        turns = [(spell("[GET]", name), spell(newest[name], "[END]")) for name in asked]
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
