"""Rotary position embeddings: rotation at given positions, plain, llama3-scaled or YaRN.

Sources: RoPE, arXiv 2104.09864; llama3 scaling as published with Llama 3.1; YaRN, arXiv 2309.00071 sections 3.2-3.4.
Pairs are "half": element i turns with element i + D/2, as checkpoints of all families here have it. Phases, sines
and cosines are float32 whatever the model's dtype: in bfloat16 a phase at position 200,000 would be noise.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow bands are slowed by `factor`, fast ones are left, those between are blended.

    Attributes:
      factor: how many times longer the context became.
      low_freq_factor: bands with fewer turns than this over the original context are slowed in full.
      high_freq_factor: bands with more turns than this over the original context are left.
      original_max_positions: tokens of context before scaling.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scale(self, frequencies: np.ndarray, rope: "Rope") -> np.ndarray:
        """Scales the frequencies [D/2], radians per token."""
        del rope
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor)

    def attention_factor(self) -> float:
        """What queries and keys are multiplied with."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Bands that turn less than `beta_slow` times over the original context are interpolated, fast ones are left.

    Attributes:
      factor: how many times longer the context became.
      original_max_positions: tokens of context before scaling.
      beta_fast: turns above which a band is left as it is.
      beta_slow: turns below which a band is interpolated in full.
      given_attention_factor: what queries and keys are multiplied with; None for the paper's 0.1 ln(factor) + 1.
      mscale: numerator weight where `given_attention_factor` is None (DeepSeek's form).
      mscale_all_dim: denominator weight, likewise; both or neither count.
      truncate: whether the ends of the ramp are rounded to whole bands.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    given_attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def scale(self, frequencies: np.ndarray, rope: "Rope") -> np.ndarray:
        """Scales the frequencies [D/2], radians per token."""

        def band_with(turns: float) -> float:
            turns_of_band_zero = self.original_max_positions / (2 * math.pi)
            return rope.head_size * math.log(turns_of_band_zero / turns) / (2 * math.log(rope.theta))

        low, high = band_with(self.beta_fast), band_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.head_size - 1)
        high = high + 0.001 if high == low else high  # the published guard against a ramp of no width
        interpolated = np.clip((np.arange(rope.head_size // 2) - low) / (high - low), 0.0, 1.0)
        return frequencies * (1.0 - interpolated) + frequencies / self.factor * interpolated

    def attention_factor(self) -> float:
        """What queries and keys are multiplied with: s = 0.1 ln(factor) + 1 unless the checkpoint says otherwise."""

        def temperature(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.given_attention_factor is not None:
            return self.given_attention_factor
        if self.mscale and self.mscale_all_dim:
            return temperature(self.mscale) / temperature(self.mscale_all_dim)
        return temperature(1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of one model.

    Attributes:
      head_size: D, even.
      theta: base of the geometric series of wavelengths.
      scaling: how frequencies were changed for a longer context, or None.
    """

    head_size: int
    theta: float = 10_000.0
    scaling: Llama3Scaling | YarnScaling | None = None

    def frequencies(self) -> np.ndarray:
        """Angular frequency of each band, radians per token, float32 [D/2], as the model really uses it."""
        exponents = np.arange(0, self.head_size, 2, dtype=np.float64) / self.head_size
        plain = self.theta**-exponents
        scaled = plain if self.scaling is None else self.scaling.scale(plain, self)
        return scaled.astype(np.float32)

    def attention_factor(self) -> float:
        """What queries and keys are each multiplied with, 1 for plain RoPE."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor()


Turns = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


def turns_at(rope: Rope, positions: Int[Array, "B T"]) -> Turns:
    """Cosines and sines at the given positions, float32, the attention factor in them; one call serves all layers."""
    phases = positions.astype(jnp.float32)[:, :, None, None] * rope.frequencies()[None, None, None]
    scale = jnp.float32(rope.attention_factor())
    return jnp.cos(phases) * scale, jnp.sin(phases) * scale


def rotate(heads: Float[Array, "B T N D"], turns: Turns) -> Float[Array, "B T N D"]:
    """Rotates heads by precomputed turns: (a, b) -> (a cos - b sin, b cos + a sin) for each band's pair."""
    cos, sin = turns
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jax.lax.convert_element_type(rotated, heads.dtype)


def unrotate(heads: Float[Array, "B T N D"], turns: Turns) -> Float[Array, "B T N D"]:
    """Undoes `rotate`, the attention factor included: (a, b) -> (a cos + b sin, b cos - a sin) / (cos^2 + sin^2)."""
    cos, sin = turns
    square = cos**2 + sin**2
    return rotate(heads, (cos / square, -sin / square))
