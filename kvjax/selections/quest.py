"""Quest (arXiv 2406.10774): all tokens are kept, and each query reads the pages that may matter to it.

    bound of a page = sum_c max(q_c low_c, q_c high_c)        low, high: of the channel over the page's keys

The pages of largest bound are read (`kvjax/pages.py`). The largest bound over the query heads of a group counts, so
that one reading serves them all; the authors choose for each query head. Memory grows with the tokens; time does not.
"""

import dataclasses

from kvjax.errors import check_between
from kvjax.selection import SELECTIONS, Selection


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(Selection):
    """Reads `budget` tokens of all.

    Attributes:
      budget: tokens that are read, sinks and window included.
      page: tokens of a page.
    """

    budget: int | float = 1024
    page: int = 16

    def __post_init__(self):
        check_between("quest(page)", self.page, 1, 1024)


SELECTIONS.register("quest", Quest)
