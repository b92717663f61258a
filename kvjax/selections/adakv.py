"""Ada-KV (arXiv 2407.11550): SnapKV with budgets that heads of a layer compete for.

    s_j         SnapKV's, pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)
    budgets     heads(adaptive,floor=0.2): the best of all heads of a layer, each head's own best safe up to a floor

The floor is kvpress's rule: every head keeps its best floor * budget tokens, the rest go to the layer's best scores.
The slots are one pool (kvjax/compaction.py), so uneven budgets take no more memory than even ones. Any selection can
have them: it is the term `heads(adaptive)`.
"""

import dataclasses
from typing import ClassVar

from kvjax.scoring import ObservedWindow
from kvjax.selection import SELECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(ObservedWindow):
    """Keeps the tokens that the last queries attend to, most in the heads that score highest."""

    name: ClassVar[str] = "adakv"
    heads: ClassVar[str] = "adaptive"


SELECTIONS.register("adakv", AdaKV)
