"""SnapKV (arXiv 2404.14469): what the last queries attend to, smoothed over neighbours.

    s_j = pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)

At decoding it is scored anew in every round, from the last w queries, each at its own position.
"""

import dataclasses

from kvjax.errors import check_between, check_choice
from kvjax.scoring import observed_window
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Selection):
    """Keeps the tokens that the last queries attend to.

    Attributes:
      queries: w, last queries that vote.
      kernel: tokens that are smoothed together, odd.
      pool: "avg" or "max".
    """

    queries: int = 64
    kernel: int = 5
    pool: str = "avg"

    def __post_init__(self):
        check_between("snapkv(queries)", self.queries, 1, 1024)
        check_choice("snapkv(kernel)", self.kernel, range(1, 64, 2))
        check_choice("snapkv(pool)", self.pool, ("avg", "max"))

    @property
    def num_queries(self) -> int:
        """W."""
        return self.queries

    def score(self, view: View) -> Scores:
        """The smoothed mean weight."""
        return observed_window(view, window=self.queries, kernel=self.kernel, pool=self.pool)


SELECTIONS.register("snapkv", SnapKV)
