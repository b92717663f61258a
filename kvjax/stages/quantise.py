"""Quantisers: numbers `B K S D` in float32 to codes, scales and offsets, and how many slots share one unit.

Exact        the numbers in a float dtype
Float8       e4m3 or e5m2, at a scale of 1 or one a token
Uniform      evenly spaced levels between the least and the largest number, or up to the largest size
Levels       the nearest of a table's levels (half-integer steps, NormalFloat, any), at a scale a token
LloydMax     Levels that are best for a rotated vector
Split        the first numbers by one quantiser, the others by another
Sketch       Levels with one bit fewer, and the signs of a random projection of what is left (in sketch.py)
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kvjax._kernels import Coded, Integers, Parts, divide, encode, to_scale, transform
from kvjax.errors import UserError

Numbers = Float[Array, "B K S D"]
Basis = Float[Any, "... D R"] | None
"""A transform that comes first, `D R`, `K D R` or `B K D R`; None for the numbers as they are."""


class Quantiser(abc.ABC):
    """Turns numbers into parts that `read_parts` turns back, and says how queries and outputs meet them."""

    granule: int = 1
    """Neighbouring slots that share one unit."""

    @abc.abstractmethod
    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """Codes of the numbers times the basis; S is a multiple of the granule and of 8; `mesh` as in `Placement`."""

    def settle(self, size: int, device: jax.Device | None) -> "Quantiser":
        """The quantiser for vectors of `size` numbers on a device (None: no device at hand).

        Raises:
          UserError: the size does not suit it.
        """
        del size, device
        return self

    def expand_queries(self, queries: jax.Array) -> jax.Array:
        """Queries `... R` as the stored numbers want them; themselves, unless more is stored than the numbers."""
        return queries

    def collapse(self, outputs: jax.Array) -> jax.Array:
        """Weighted sums of stored numbers back to R numbers."""
        return outputs


def transformed(numbers: Numbers, basis: Basis) -> Float[Array, "B K S R"]:
    """The numbers times the basis; R is D without one."""
    return numbers if basis is None else transform(numbers, jnp.asarray(basis, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Exact(Quantiser):
    """The numbers themselves.

    Attributes:
      dtype: name of a float dtype.
    """

    dtype: str

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """One array of floats."""
        del mesh
        return (Coded(planes=(transformed(numbers, basis).astype(self.dtype),)),)


@dataclasses.dataclass(frozen=True)
class Float8(Quantiser):
    """Eight-bit floats.

    Attributes:
      dtype: "float8_e4m3fn" (largest 448) or "float8_e5m2" (largest 57,344); "" leaves it to the device: e5m2 on NVIDIA
        chips before compute capability 8.9, which convert only that one, e4m3fn everywhere else.
      scaled: whether each token has a scale that takes its largest number to 448; else the scale is 1 and
        larger numbers are held at the format's largest.
    """

    dtype: str = ""
    scaled: bool = False

    def settle(self, size: int, device: jax.Device | None) -> "Float8":
        """The format for the device."""
        del size
        if self.dtype:
            return self
        capability = str(getattr(device, "compute_capability", ""))  # "8.0" on NVIDIA, a name such as gfx942 on AMD
        is_old = capability.replace(".", "", 1).isdecimal() and float(capability) < 8.9
        return dataclasses.replace(self, dtype="float8_e5m2" if is_old else "float8_e4m3fn")

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """The floats' bytes, and scales `B K S` where asked for."""
        del mesh
        numbers, largest = transformed(numbers, basis), float(jnp.finfo(self.dtype).max)
        scale = None
        if self.scaled:
            # 448 for both formats: e5m2's own largest would make scales too small for 16 bits
            scale = to_scale(jnp.max(jnp.abs(numbers), axis=-1) / min(largest, 448.0))
            numbers = divide(numbers, scale.astype(jnp.float32)[..., None])
        held = jnp.clip(numbers, -largest, largest)  # e4m3fn has no infinity: beyond its largest comes NaN
        return (Coded(planes=(held.astype(self.dtype).view(jnp.int8),), scale=scale, dtype=self.dtype),)


@dataclasses.dataclass(frozen=True)
class Uniform(Integers, Quantiser):
    """Evenly spaced levels: the rule `Integers`, whose attributes are its own."""

    def settle(self, size: int, device: jax.Device | None) -> "Uniform":
        """Itself, if whole groups of channels make up a vector."""
        del device
        if self.channel_group is not None and size % self.channel_group:
            near = math.gcd(size, self.channel_group)
            raise UserError(
                f"Groups of {self.channel_group} channels do not divide the head size {size}. The nearest that does is "
                f"group={near}."
            )
        return self

    @property
    def granule(self) -> int:
        """Neighbouring slots that share one unit."""
        return self.token_group

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """Codes with scales, and offsets where asymmetric."""
        return (encode(numbers, self, basis=basis, mesh=mesh),)


@dataclasses.dataclass(frozen=True)
class Split(Quantiser):
    """The first part of the numbers by one quantiser, the others by another, each with its own scale.

    Attributes:
      share: one number in this many belongs to the first part.
      first: their quantiser.
      second: the others'.
    """

    share: int
    first: Quantiser
    second: Quantiser

    @property
    def granule(self) -> int:
        """Neighbouring slots that share one unit."""
        return math.lcm(self.first.granule, self.second.granule)

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """The parts of the first, then those of the second."""
        numbers = transformed(numbers, basis)
        width = numbers.shape[-1] // self.share
        first = self.first.encode(numbers[..., :width], mesh=mesh)
        return first + self.second.encode(numbers[..., width:], mesh=mesh)
