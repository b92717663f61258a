"""Quantisers that store the nearest of a table's levels, at a scale for each token."""

import dataclasses

from jax.sharding import Mesh

from kvjax._kernels import Parts, Table, encode
from kvjax.stages.codebook import lloyd_max
from kvjax.stages.quantise import Basis, Numbers, Quantiser


@dataclasses.dataclass(frozen=True)
class Levels(Table, Quantiser):
    """The nearest of a table's levels, at a scale a token: the rule `Table`, whose attributes are its own."""

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """Codes, and scales `B K S`."""
        return (encode(numbers, self, basis=basis, mesh=mesh),)


@dataclasses.dataclass(frozen=True)
class LloydMax(Quantiser):
    """The levels that are best for the coordinates of a randomly rotated vector.

    Attributes:
      bits: of a code.
      source: "beta", the exact density for vectors of R numbers, or "normal", its limit.
      scale: see `Table`.
    """

    bits: int
    source: str = "beta"
    scale: str = "norm"

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """Codes, and scales `B K S`."""
        width = numbers.shape[-1] if basis is None else basis.shape[-1]
        size = width if self.source == "beta" else None
        return Levels(levels=lloyd_max(self.bits, size), scale=self.scale).encode(numbers, basis, mesh=mesh)


def half_integer_levels(bits: int, step: float) -> Levels:
    """Levels (i + 1/2) step, kept as integer codes: what an integer matrix unit takes as they are."""
    half = 1 << (bits - 1)
    return Levels(levels=tuple((index + 0.5) * step for index in range(-half, half)), shift=0.5, step=step)
