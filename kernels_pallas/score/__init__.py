"""What a selection thinks of keys as they are stored: products with rows, and weighted lengths of their bands."""

from kernels_pallas.score.api import IMPLEMENTATIONS, chosen_implementation, score, window_mass
from kernels_pallas.score.reference import StoredKeys

__all__ = ["IMPLEMENTATIONS", "StoredKeys", "chosen_implementation", "score", "window_mass"]
