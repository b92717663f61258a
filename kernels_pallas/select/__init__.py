"""Which slots of a row are kept: the best by protection, score and age, as many as the budget allows."""

from kernels_pallas.select.api import IMPLEMENTATIONS, chosen_implementation, select

__all__ = ["IMPLEMENTATIONS", "chosen_implementation", "select"]
