"""The definition of the operation in plain jax.numpy: which code each number gets, and which scale is stored.

`encode_token` is what a kernel calls too, on the numbers of a few tokens; packing and where scales lie are its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.coded import Coded, pack

SCALE_DTYPE = jnp.float16
"""Of scales and offsets: 16 bits with 11 of significance, as the published codecs count them."""

LARGEST_SCALE = 65504.0
TINY = float(jnp.finfo(jnp.float32).tiny)
RULES = ("raw", "norm", "unbiased", "largest")

Numbers = Float[Array, "*tokens R"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers:
    """Evenly spaced levels.

    asymmetric: z = min, s = (max - min) / (2**b - 1), code = round((x - z) / s), kept as x = s code + z
    symmetric:  s = max|x| / (2**(b-1) - 1), code = round(x / s) by the s that is stored

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The nearest of a table's levels, at a scale a token.

    With u = x sqrt(R) / |x| and c the levels nearest to u, the stored scale is (quantization notes of EDEN, arXiv
    2604.18555, and of the TurboQuant implementations)

        raw       |x| / sqrt(R)        TurboQuant's own; shrinks products by 1 - D
        norm      |x| / |c|            keeps the length, best for softmax at 3 and 4 bits
        unbiased  |x| sqrt(R) / <u, c> keeps products on average (EDEN)
        largest   max|x| / max|level|  for tables that span a range, such as NormalFloat; u is x over this scale

    Attributes:
      levels: ascending, a power of two of them.
      scale: one of `RULES`.
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


Rule = Integers | Table


def by_token(rule: Rule) -> bool:
    """Whether each token has one scale."""
    return isinstance(rule, Table) or (rule.token_group == 1 and rule.channel_group is None)


def encode(numbers: Float[Array, "B K S D"], rule: Rule, *, basis: Float[Array, "... D R"] | None = None) -> Coded:
    """See `api.encode`."""
    wide = numbers.astype(jnp.float32)
    if basis is not None:
        wide = transform(wide, basis)
    if by_token(rule):
        codes, scale, offset = encode_token(wide, rule)
        return coded(pack(codes, rule.bits), scale[..., 0], None if offset is None else offset[..., 0], rule)
    batch, heads, slots, size = wide.shape
    if rule.token_group > 1:
        grouped, axis = wide.reshape(batch, heads, slots // rule.token_group, rule.token_group, size), 3
    else:
        grouped, axis = wide.reshape(batch, heads, slots, -1, rule.channel_group), 4
    codes, *scales = _integers(grouped, rule, axis=axis)
    # `B K S/t R` or `B K C S`: tokens on the last axis where scales belong to them.
    laid_out = (
        None if array is None else array[:, :, :, 0] if axis == 3 else jnp.swapaxes(array[..., 0], 2, 3)
        for array in scales
    )
    return coded(pack(codes.reshape(wide.shape), rule.bits), *laid_out, rule)


def transform(numbers: Float[Array, "B K S D"], basis: Float[Array, "... D R"]) -> Float[Array, "B K S R"]:
    """Y = x A by a matrix `D R`, `K D R` or `B K D R`."""
    exact = jax.lax.Precision.HIGHEST
    if basis.ndim == 2:
        return jnp.matmul(numbers, basis, precision=exact)
    columns = jnp.broadcast_to(basis if basis.ndim == 4 else basis[None], (*numbers.shape[:2], *basis.shape[-2:]))
    return jnp.einsum("BKSD,BKDR->BKSR", numbers, columns, precision=exact)


def coded(planes: tuple[jax.Array, ...], scale: jax.Array, offset: jax.Array | None, rule: Rule) -> Coded:
    """Packed codes with what they stand for; scales and offsets are rounded to how they are stored."""
    stored = {"planes": planes, "scale": to_scale(scale), "offset": None if offset is None else to_scale(offset)}
    if isinstance(rule, Table):
        return Coded(**stored, bits=rule.bits, levels=None if rule.shift else rule.levels, shift=rule.shift)
    shift = 0.0 if rule.symmetric else float(1 << (rule.bits - 1))
    return Coded(**stored, bits=rule.bits, shift=shift, token_group=rule.token_group)


def to_scale(array: jax.Array) -> jax.Array:
    """A scale as it is stored, held within the dtype's range."""
    if array.dtype == SCALE_DTYPE:
        return array
    return jnp.clip(array, -LARGEST_SCALE, LARGEST_SCALE).astype(SCALE_DTYPE)


def read_scale(array: jax.Array) -> jax.Array:
    """A scale as it will be read."""
    return to_scale(array).astype(jnp.float32)


def itself(facts: Any) -> Any:
    """Facts of tokens where they are."""
    return facts


@dataclasses.dataclass(frozen=True)
class Ways:
    """How facts of tokens, scales and the like, are handled.

    Attributes:
      gather: takes what a reduction over R leaves to where arithmetic on it is cheap.
      spread: takes it back, to beside the numbers.
      read_scale: a scale as it will be read.
      round: to the nearest integer, of two the even one.
    """

    gather: Callable[[Any], Any] = itself
    spread: Callable[[Any], Any] = itself
    read_scale: Callable[[Any], Any] = read_scale
    round: Callable[[Any], Any] = jnp.round


def encode_token(
    numbers: Numbers, rule: Rule, ways: Ways = Ways()
) -> tuple[Int[Array, "*tokens R"], jax.Array, jax.Array | None]:
    """Codes, and scale and offset (or None) of each token, where they were gathered, before they are rounded.

    Args:
      numbers: float32.
      rule: one that is `by_token`.
      ways: how facts of tokens are handled.
    """
    if isinstance(rule, Integers):
        return _integers(numbers, rule, axis=numbers.ndim - 1, ways=ways)
    size = numbers.shape[-1]

    def mean(products: jax.Array) -> jax.Array:
        return ways.gather(jnp.sum(products, axis=-1, keepdims=True)) * (1.0 / size)

    if rule.scale == "largest":
        largest = ways.gather(jnp.max(jnp.abs(numbers), axis=-1, keepdims=True))
        length = largest * (1.0 / max(map(abs, rule.levels)))
    else:
        length = jnp.sqrt(mean(jnp.square(numbers)))
    unit = numbers * ways.spread(inverse(length))
    codes, levels = nearest(unit, rule)
    scale = length
    if rule.scale == "norm":
        scale = divide(length, jnp.sqrt(mean(jnp.square(levels))))
    elif rule.scale == "unbiased":
        scale = divide(length, mean(unit * levels))
    return codes, scale * rule.step, None


def _integers(
    numbers: jax.Array, rule: Integers, *, axis: int, ways: Ways = Ways()
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes, scale and offset of numbers that share them along an axis."""
    scale, offset = scale_of(tuple(map(ways.gather, ends_of(numbers, rule, axis=axis))), rule)
    return integers(numbers, scale, offset, rule=rule, ways=ways), scale, offset


def ends_of(numbers: jax.Array, rule: Integers, *, axis: int) -> tuple[jax.Array, ...]:
    """What the scale of numbers along an axis follows from: the largest size, or the least and the largest number."""
    if rule.symmetric:
        return (jnp.max(jnp.abs(numbers), axis=axis, keepdims=True),)
    return jnp.min(numbers, axis=axis, keepdims=True), jnp.max(numbers, axis=axis, keepdims=True)


def ends_of_both(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The ends of numbers and of others that share their scale."""
    largest = jnp.maximum(one[-1], other[-1])
    return (largest,) if len(one) == 1 else (jnp.minimum(one[0], other[0]), largest)


def scale_of(ends: tuple[jax.Array, ...], rule: Integers) -> tuple[jax.Array, jax.Array | None]:
    """Scale and offset (or None) of numbers with these ends."""
    half = 1 << (rule.bits - 1)
    if rule.symmetric:
        return ends[0] * (1.0 / (half - 1)), None
    low, high = ends
    if rule.clip < 1.0:
        middle, reach = (low + high) / 2, (high - low) / 2 * rule.clip
        low, high = middle - reach, middle + reach
    return (high - low) * (1.0 / (2 * half - 1)), low


def integers(
    numbers: jax.Array, scale: jax.Array, offset: jax.Array | None, *, rule: Integers, ways: Ways = Ways()
) -> jax.Array:
    """Codes of numbers by a scale and an offset, None where symmetric, before these are rounded."""
    half = 1 << (rule.bits - 1)
    if offset is None:
        codes = ways.round(numbers * ways.spread(inverse(ways.read_scale(scale))))
        return jnp.clip(codes, 1 - half, half - 1).astype(jnp.int32)
    codes = ways.round((numbers - ways.spread(offset)) * ways.spread(inverse(scale)))
    return jnp.clip(codes, 0, 2 * half - 1).astype(jnp.int32) - half


def nearest(unit: Numbers, rule: Table) -> tuple[Int[Array, "*tokens R"], Numbers]:
    """Codes of the nearest levels, the lowest level's first (-len/2), and the levels."""
    half = len(rule.levels) // 2
    if rule.shift:
        codes = jnp.clip(jnp.floor(unit * (1.0 / rule.step)), -half, half - 1)
        return codes.astype(jnp.int32), (codes + 0.5) * rule.step
    middles = thresholds(rule.levels)
    if any(low != -high for low, high in zip(rule.levels, rule.levels[::-1], strict=True)):
        return _climb(unit, rule.levels, middles, -half)
    # Of a mirrored table the upper half: one pass over half the levels.
    code, level = _climb(jnp.abs(unit), rule.levels[half:], middles[half:], 0)
    upper = unit > 0
    return jnp.where(upper, code, -1 - code), jnp.where(upper, level, -level)


def _climb(
    unit: Numbers, levels: tuple[float, ...], middles: tuple[float, ...], first: int
) -> tuple[Int[Array, "*tokens R"], Numbers]:
    """The highest level whose lower threshold is surpassed, by one select a level."""
    code, level = jnp.full(unit.shape, first, jnp.int32), jnp.full(unit.shape, levels[0], jnp.float32)
    for index, middle in enumerate(middles):
        surpassed = unit > middle
        code = jnp.where(surpassed, first + index + 1, code)
        level = jnp.where(surpassed, levels[index + 1], level)
    return code, level


def thresholds(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The middles between levels."""
    return tuple((low + high) / 2 for low, high in zip(levels, levels[1:], strict=False))


def divide(numbers: jax.Array, scale: jax.Array) -> jax.Array:
    """Numbers / scale, 0 where the scale is 0."""
    return jnp.where(scale == 0, 0.0, numbers / jnp.where(scale == 0, 1.0, scale))


def inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, 0 where the scale is 0 or no normal number."""
    return jnp.where(jnp.abs(scale) < TINY, 0.0, 1.0 / jnp.where(jnp.abs(scale) < TINY, 1.0, scale))
