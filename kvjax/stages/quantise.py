"""Quantisers: numbers `B K S R` in float32 to codes, scales and offsets, and how many slots share one unit.

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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax._kernels import Coded, Parts, pack
from kvjax.errors import UserError

SCALE_DTYPE = jnp.float16
"""Of scales and offsets: 16 bits with 11 of significance, as the published codecs count them."""

Numbers = Float[Array, "B K S R"]


class Quantiser(abc.ABC):
    """Turns numbers into parts that `read_parts` turns back, and says how queries and outputs meet them."""

    granule: int = 1
    """Neighbouring slots that share one unit."""

    @abc.abstractmethod
    def encode(self, numbers: Numbers) -> Parts:
        """Codes of the numbers; S is a multiple of the granule and of 8."""

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


def to_scale(array: jax.Array) -> jax.Array:
    """A scale as it is stored, held within the dtype's range."""
    return jnp.clip(array, -65504.0, 65504.0).astype(SCALE_DTYPE)


def divide(numbers: jax.Array, scale: jax.Array) -> jax.Array:
    """Numbers / scale, 0 where the scale is 0."""
    return jnp.where(scale == 0, 0.0, numbers / jnp.where(scale == 0, 1.0, scale))


@dataclasses.dataclass(frozen=True)
class Exact(Quantiser):
    """The numbers themselves.

    Attributes:
      dtype: name of a float dtype.
    """

    dtype: str

    def encode(self, numbers: Numbers) -> Parts:
        """One array of floats."""
        return (Coded(planes=(numbers.astype(self.dtype),)),)


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

    def encode(self, numbers: Numbers) -> Parts:
        """The floats' bytes, and scales `B K S` where asked for."""
        largest = float(jnp.finfo(self.dtype).max)
        scale = None
        if self.scaled:
            # 448 for both formats: e5m2's own largest would make scales too small for 16 bits
            scale = to_scale(jnp.max(jnp.abs(numbers), axis=-1) / min(largest, 448.0))
            numbers = divide(numbers, scale.astype(jnp.float32)[..., None])
        held = jnp.clip(numbers, -largest, largest)  # e4m3fn has no infinity: beyond its largest comes NaN
        return (Coded(planes=(held.astype(self.dtype).view(jnp.int8),), scale=scale, dtype=self.dtype),)


@dataclasses.dataclass(frozen=True)
class Uniform(Quantiser):
    """Evenly spaced levels.

    asymmetric: z = min, s = (max - min) / (2**b - 1), code = round((x - z) / s), kept as x = s code + z
    symmetric:  s = max|x| / (2**(b-1) - 1), code = round(x / s)

    Attributes:
      bits: b, of a code.
      symmetric: about 0, without an offset.
      token_group: tokens of one channel that share a scale; 1 for scales that belong to tokens.
      channel_group: channels of one token that share a scale; None for all.
      clip: share of the range from min to max that is kept, about its middle; what lies outside is held at its ends.
    """

    bits: int
    symmetric: bool = False
    token_group: int = 1
    channel_group: int | None = None
    clip: float = 1.0

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

    def encode(self, numbers: Numbers) -> Parts:
        """Codes with scales, and offsets where asymmetric."""
        grouped, axis = self._group(numbers)
        half = 1 << (self.bits - 1)
        if self.symmetric:
            scale = jnp.max(jnp.abs(grouped), axis=axis, keepdims=True) / (half - 1)
            steps = divide(grouped, to_scale(scale).astype(jnp.float32))  # by the scale as it will be read
            codes = jnp.clip(jnp.round(steps), 1 - half, half - 1)
            return (self._coded(codes, numbers.shape, scale, None),)
        low, high = jnp.min(grouped, axis=axis, keepdims=True), jnp.max(grouped, axis=axis, keepdims=True)
        if self.clip < 1.0:
            middle, reach = (low + high) / 2, (high - low) / 2 * self.clip
            low, high = middle - reach, middle + reach
        scale = (high - low) / (2 * half - 1)
        codes = jnp.clip(jnp.round(divide(grouped - low, scale)), 0, 2 * half - 1)
        return (self._coded(codes - half, numbers.shape, scale, low),)

    def _group(self, numbers: Numbers) -> tuple[jax.Array, int]:
        """The numbers with one axis of those that share a scale."""
        batch, heads, slots, size = numbers.shape
        if self.token_group > 1:
            return numbers.reshape(batch, heads, slots // self.token_group, self.token_group, size), 3
        return numbers.reshape(batch, heads, slots, -1, self.channel_group or size), 4

    def _coded(self, codes: jax.Array, shape: tuple[int, ...], scale: jax.Array, offset: jax.Array | None) -> Coded:
        return Coded(
            planes=pack(codes.reshape(shape).astype(jnp.int32), self.bits),
            scale=self._lay_out(scale),
            offset=None if offset is None else self._lay_out(offset),
            bits=self.bits,
            shift=0.0 if self.symmetric else float(1 << (self.bits - 1)),
            token_group=self.token_group,
        )

    def _lay_out(self, scales: jax.Array) -> jax.Array:
        """`B K S/t R`, `B K C S` or `B K S`, tokens on the last axis where scales belong to them."""
        stored = to_scale(scales)
        if self.token_group > 1:
            return stored[:, :, :, 0]
        by_token = stored[..., 0]  # B K S C
        return by_token[..., 0] if self.channel_group is None else jnp.swapaxes(by_token, 2, 3)


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

    def encode(self, numbers: Numbers) -> Parts:
        """The parts of the first, then those of the second."""
        width = numbers.shape[-1] // self.share
        return self.first.encode(numbers[..., :width]) + self.second.encode(numbers[..., width:])
