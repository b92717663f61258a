"""PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall from layer to layer.

    s_j         SnapKV's, pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)
    budgets     layers(pyramid,beta=20): equal steps from 2 m - m / beta down to m / beta, m the mean body

The budgets of all layers add up to the uniform ones exactly (kvjax/policy.py); the authors' integer steps overshoot,
and kvpress falls back to uniform budgets below 1,280 tokens.
"""

import dataclasses
from typing import ClassVar

from kvjax.errors import check_between, check_choice
from kvjax.scoring import observed_window
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(Selection):
    """Keeps the tokens that the last queries attend to.

    Attributes:
      queries: w, last queries that vote.
      kernel: tokens that are smoothed together, odd.
      pool: "avg" or "max".
    """

    schedule: ClassVar[str] = "pyramid"

    queries: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self):
        check_between("pyramidkv(queries)", self.queries, 1, 1024)
        check_choice("pyramidkv(kernel)", self.kernel, range(1, 64, 2))
        check_choice("pyramidkv(pool)", self.pool, ("avg", "max"))

    @property
    def num_queries(self) -> int:
        """W."""
        return self.queries

    def score(self, view: View) -> Scores:
        """The smoothed mean weight."""
        return observed_window(view, window=self.queries, kernel=self.kernel, pool=self.pool)


SELECTIONS.register("pyramidkv", PyramidKV)
