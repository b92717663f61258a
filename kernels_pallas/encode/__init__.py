"""Numbers to packed codes and scales: a transform, a scale, the nearest level, and bytes."""

from kernels_pallas.encode.api import IMPLEMENTATIONS, chosen_implementation, encode
from kernels_pallas.encode.reference import Integers, Table

__all__ = ["IMPLEMENTATIONS", "Integers", "Table", "chosen_implementation", "encode"]
