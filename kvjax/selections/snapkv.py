"""SnapKV (arXiv 2404.14469): what the last queries attend to, smoothed over neighbours.

    s_j = pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)

At decoding it is scored anew in every round, from the last w queries, each at its own position.
"""

import dataclasses
from typing import ClassVar

from kvjax.scoring import ObservedWindow
from kvjax.selection import SELECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(ObservedWindow):
    """Keeps the tokens that the last queries attend to."""

    name: ClassVar[str] = "snapkv"


SELECTIONS.register("snapkv", SnapKV)
