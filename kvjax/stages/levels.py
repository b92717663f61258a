"""Quantisers that store the nearest of a table's levels, at a scale for each token."""

import dataclasses

from kvjax._kernels import Parts, Table, encode
from kvjax.stages.codebook import lloyd_max
from kvjax.stages.quantise import Basis, Numbers, Quantiser


@dataclasses.dataclass(frozen=True)
class Levels(Quantiser):
    """The nearest of a table's levels, at a scale a token: see `kernels_pallas.encode.reference.Table`.

    Attributes:
      levels: ascending, a power of two of them.
      scale: one of the four rules.
      shift: 1/2 if the levels are the half-integers times `step`, which are then not looked up.
      step: of these.
    """

    levels: tuple[float, ...]
    scale: str = "norm"
    shift: float = 0.0
    step: float = 1.0

    @property
    def bits(self) -> int:
        """Of a code."""
        return len(self.levels).bit_length() - 1

    def encode(self, numbers: Numbers, basis: Basis = None) -> Parts:
        """Codes, and scales `B K S`."""
        table = Table(levels=self.levels, scale=self.scale, shift=self.shift, step=self.step)
        return (encode(numbers, table, basis=basis),)


@dataclasses.dataclass(frozen=True)
class LloydMax(Quantiser):
    """The levels that are best for the coordinates of a randomly rotated vector.

    Attributes:
      bits: of a code.
      source: "beta", the exact density for vectors of R numbers, or "normal", its limit.
      scale: see `Levels`.
    """

    bits: int
    source: str = "beta"
    scale: str = "norm"

    def encode(self, numbers: Numbers, basis: Basis = None) -> Parts:
        """Codes, and scales `B K S`."""
        width = numbers.shape[-1] if basis is None else basis.shape[-1]
        size = width if self.source == "beta" else None
        return Levels(levels=lloyd_max(self.bits, size), scale=self.scale).encode(numbers, basis)


def half_integer_levels(bits: int, step: float) -> Levels:
    """Levels (i + 1/2) step, kept as integer codes: what an integer matrix unit takes as they are."""
    half = 1 << (bits - 1)
    return Levels(levels=tuple((index + 0.5) * step for index in range(-half, half)), shift=0.5, step=step)
