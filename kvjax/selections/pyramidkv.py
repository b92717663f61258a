"""PyramidKV (arXiv 2406.02069): SnapKV with budgets that fall from layer to layer.

    s_j         SnapKV's, pool( mean over the last w queries i of A_ij )        (kvjax/scoring.py, observed_window)
    budgets     layers(pyramid,beta=20): equal steps from 2 m - m / beta down to m / beta, m the mean body

The budgets of all layers add up to the uniform ones exactly (kvjax/policy.py); the authors' integer steps overshoot,
and kvpress falls back to uniform budgets below 1,280 tokens.
"""

import dataclasses
from typing import ClassVar

from kvjax.scoring import ObservedWindow
from kvjax.selection import SELECTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(ObservedWindow):
    """Keeps the tokens that the last queries attend to, more of them in the first layers."""

    name: ClassVar[str] = "pyramidkv"
    schedule: ClassVar[str] = "pyramid"


SELECTIONS.register("pyramidkv", PyramidKV)
