"""Ada-KV (arXiv 2407.11550): SnapKV with budgets that heads of a layer compete for.

    s_j         SnapKV's, pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)
    budgets     heads(adaptive,floor=0.2): the best of all heads of a layer, each head's own best safe up to a floor

The floor is kvpress's rule: every head keeps its best floor * budget tokens, the rest go to the layer's best scores.
The slots are one pool (kvjax/compaction.py), so uneven budgets take no more memory than even ones. Any selection can
have them: it is the term `heads(adaptive)`.
"""

import dataclasses
from typing import ClassVar

from kvjax.errors import check_between, check_choice
from kvjax.scoring import observed_window
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(Selection):
    """Keeps the tokens that the last queries attend to.

    Attributes:
      queries: w, last queries that vote.
      kernel: tokens that are smoothed together, odd.
      pool: "avg" or "max".
    """

    heads: ClassVar[str] = "adaptive"

    queries: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self):
        check_between("adakv(queries)", self.queries, 1, 1024)
        check_choice("adakv(kernel)", self.kernel, range(1, 64, 2))
        check_choice("adakv(pool)", self.pool, ("avg", "max"))

    @property
    def num_queries(self) -> int:
        """W."""
        return self.queries

    def score(self, view: View) -> Scores:
        """The smoothed mean weight."""
        return observed_window(view, window=self.queries, kernel=self.kernel, pool=self.pool)


SELECTIONS.register("adakv", AdaKV)
