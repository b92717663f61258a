"""Quantisers that store the nearest of a table's levels, at a scale for each token."""

import dataclasses

import jax
import jax.numpy as jnp

from kvjax._kernels import Coded, Parts, look_up, pack
from kvjax.stages.codebook import lloyd_max, thresholds
from kvjax.stages.quantise import Numbers, Quantiser, divide, to_scale


@dataclasses.dataclass(frozen=True)
class Levels(Quantiser):
    """The nearest of a table's levels, at a scale a token.

    With u = x sqrt(R) / |x| and c the levels nearest to u, the stored scale is (quantization notes of EDEN, arXiv
    2604.18555, and of the TurboQuant implementations)

        raw       |x| / sqrt(R)        TurboQuant's own; shrinks products by 1 - D
        norm      |x| / |c|            keeps the length, best for softmax at 3 and 4 bits
        unbiased  |x| sqrt(R) / <u, c> keeps products on average (EDEN)
        largest   max|x| / max|level|  for tables that span a range, such as NormalFloat; u is x over this scale

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

    def encode(self, numbers: Numbers) -> Parts:
        """Codes, and scales `B K S`."""
        norm, unit = self._normalise(numbers)
        codes = jnp.full(unit.shape, -(len(self.levels) // 2), jnp.int32)
        for threshold in thresholds(self.levels):
            codes = codes + (unit > threshold).astype(jnp.int32)
        scale = self._scale(norm, unit, look_up(codes, self.levels))
        return (
            Coded(
                planes=pack(codes, self.bits),
                scale=to_scale(scale * self.step),
                bits=self.bits,
                levels=None if self.shift else self.levels,
                shift=self.shift,
            ),
        )

    def _normalise(self, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
        """Size of each vector, `B K S`, and the vector in units in which the levels are given."""
        if self.scale == "largest":
            size = jnp.max(jnp.abs(numbers), axis=-1) / max(map(abs, self.levels))
        else:
            size = jnp.sqrt(jnp.sum(jnp.square(numbers), axis=-1) / numbers.shape[-1])
        return size, divide(numbers, size[..., None])

    def _scale(self, size: jax.Array, unit: jax.Array, levels: jax.Array) -> jax.Array:
        """What the levels are multiplied with."""
        if self.scale in ("raw", "largest"):
            return size
        if self.scale == "norm":
            length = jnp.sqrt(jnp.sum(jnp.square(levels), axis=-1) / levels.shape[-1])
            return size / length
        agreement = jnp.sum(unit * levels, axis=-1) / levels.shape[-1]
        return divide(size, agreement)


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

    def encode(self, numbers: Numbers) -> Parts:
        """Codes, and scales `B K S`."""
        size = numbers.shape[-1] if self.source == "beta" else None
        return Levels(levels=lloyd_max(self.bits, size), scale=self.scale).encode(numbers)


def half_integer_levels(bits: int, step: float) -> Levels:
    """Levels (i + 1/2) step, kept as integer codes: what an integer matrix unit takes as they are."""
    half = 1 << (bits - 1)
    return Levels(levels=tuple((index + 0.5) * step for index in range(-half, half)), shift=0.5, step=step)
