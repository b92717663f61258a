"""How compressed vectors lie in memory; what every operation on a cache's body reads.

A head's S vectors of R numbers are a tuple of parts, each some of the numbers:

    Coded     x[s, r] = scale (level(code[s, r]) + shift) + offset, codes of 1 to 8 bits packed into bytes, or floats
    Rotated   parts that hold keys from before RoPE, turned at the slots' positions when they are read

Codes are two's complement and packed along the token axis, lowest bits first: of b bits, the code of token t lies in
byte t b // 8. Widths that do not divide 8 are split into planes of 4, 2 and 1 bits, low bits first: 3 = 2 + 1.

    tokens       0  1  2  3 |  4  5  6  7 | ...          2 bits, one channel:
    byte            0       |      1      |              byte 0 = code 0 + 4 code 1 + 16 code 2 + 64 code 3

Scales and offsets belong to a token (`B K S`), to a group of channels of a token (`B K C S`, tokens on the last axis),
or to a channel of a group of tokens (`B K S/t R`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def plane_bits(bits: int) -> tuple[int, ...]:
    """Widths of the planes that hold codes of 1 to 8 bits, the low bits' plane first: 3 -> (2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def pack(codes: Int[Array, "... S R"], bits: int) -> tuple[Int[Array, "... _ R"], ...]:
    """Packs integers, of which the `bits` lowest count, into planes of bytes.

    Args:
      codes: any integer dtype; S a multiple of 8 unless `bits` is 8.
      bits: 1 to 8.

    Returns:
      One int8 array a plane, `... S*width/8 R`.
    """
    planes, low = [], 0
    unsigned = codes.astype(jnp.int32) & ((1 << bits) - 1)
    for width in plane_bits(bits):
        per_byte = 8 // width
        part = (unsigned >> low) & ((1 << width) - 1)
        part = part.reshape(*codes.shape[:-2], codes.shape[-2] // per_byte, per_byte, codes.shape[-1])
        packed = sum(part[..., index, :] << (width * index) for index in range(per_byte))
        planes.append(packed.astype(jnp.uint8).view(jnp.int8))
        low += width
    return tuple(planes)


def unpack(planes: tuple[Int[Array, "... _ R"], ...], bits: int) -> Int[Array, "... S R"]:
    """The codes that `pack` packed, as int8 in two's complement: -2**(bits-1) to 2**(bits-1) - 1."""
    whole, low = None, 0
    for plane, width in zip(planes, plane_bits(bits), strict=True):
        if width == 8:
            return plane
        per_byte, bytes_ = 8 // width, plane.view(jnp.uint8)
        shifts = (jnp.arange(per_byte, dtype=jnp.uint8) * width).reshape(*(1,) * (plane.ndim - 1), per_byte, 1)
        part = (bytes_[..., None, :] >> shifts) & ((1 << width) - 1)
        part = part.reshape(*plane.shape[:-2], plane.shape[-2] * per_byte, plane.shape[-1]) << low
        whole = part if whole is None else whole | part
        low += width
    sign = 1 << (bits - 1)
    return ((whole ^ sign) - sign).view(jnp.int8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "scale", "offset"),
    meta_fields=("bits", "levels", "shift", "token_group", "dtype"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Coded:
    """Numbers as codes with scales, or as floats.

    Attributes:
      planes: int8 arrays `B K S*width/8 R`, see `pack`; one array `B K S R` where `bits` is None, of floats, or of the
        bytes of 8-bit floats (as floats, XLA's CPU backend would convert a whole segment to cut one block out).
      scale: `B K S`, `B K C S` or `B K S/t R`; None is 1.
      offset: added after scaling, shaped as `scale`; None is 0.
      bits: of a code, 1 to 8; None for floats.
      levels: what each of the 2**bits codes stands for, the lowest code first; None if codes stand for themselves.
      shift: added to every level: 1/2 for levels at half-integers, 2**(bits-1) for codes that count from 0.
      token_group: tokens that share a channel's scale; 1 if scales belong to tokens.
      dtype: name of the 8-bit float that the bytes are, or "".
    """

    planes: Any
    scale: Any = None
    offset: Any = None
    bits: int | None = None
    levels: tuple[float, ...] | None = None
    shift: float = 0.0
    token_group: int = 1
    dtype: str = ""

    @property
    def num_slots(self) -> int:
        """S."""
        width = 8 if self.bits is None else plane_bits(self.bits)[0]
        return self.planes[0].shape[2] * 8 // width

    @property
    def num_heads(self) -> int:
        """K, the heads that are stored."""
        return self.planes[0].shape[1]

    @property
    def alignment(self) -> int:
        """Blocks of slots begin and end at multiples of this."""
        bits = 1 if self.bits is None else math.lcm(*(8 // width for width in plane_bits(self.bits)))
        return math.lcm(bits, self.token_group)

    def map_tokens(self, function: Callable[..., Any], *others: "Coded") -> "Coded":
        """Applies a function to each array with its token axis and its entries per token as a fraction.

        Args:
          function: `(array, *arrays of others, axis=, entries=(numerator, denominator))` -> array.
          others: parts of the same layout.
        """
        widths = (8,) if self.bits is None else plane_bits(self.bits)
        planes = tuple(
            function(plane, *[other.planes[index] for other in others], axis=2, entries=(width, 8))
            for index, (plane, width) in enumerate(zip(self.planes, widths, strict=True))
        )

        def scales(name: str) -> Any:
            array = getattr(self, name)
            if array is None:
                return None
            axis = 2 if self.token_group > 1 else array.ndim - 1
            return function(array, *[getattr(o, name) for o in others], axis=axis, entries=(1, self.token_group))

        return dataclasses.replace(self, planes=planes, scale=scales("scale"), offset=scales("offset"))

    def read(self, positions: Int[Array, "B #K S"] | None = None) -> Float[Array, "B k S R"]:
        """The numbers in float32."""
        del positions
        if self.bits is None:
            floats = self.planes[0].view(self.dtype) if self.dtype else self.planes[0]
            numbers = floats.astype(jnp.float32)
        else:
            codes = unpack(self.planes, self.bits)
            numbers = codes.astype(jnp.float32) if self.levels is None else look_up(codes, self.levels)
        if self.shift:
            numbers = numbers + self.shift
        if self.scale is not None:
            numbers = numbers * self._spread(self.scale, numbers.shape)
        return numbers if self.offset is None else numbers + self._spread(self.offset, numbers.shape)

    def _spread(self, scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Scales at each number."""
        wide = scales.astype(jnp.float32)
        if self.token_group > 1:
            return jnp.repeat(wide, self.token_group, axis=2)
        if wide.ndim == 3:
            return wide[..., None]
        return jnp.repeat(jnp.swapaxes(wide, 2, 3), shape[3] // wide.shape[2], axis=3)


def look_up(codes: Int[Array, "..."], levels: tuple[float, ...]) -> Float[Array, "..."]:
    """levels[code + len(levels)/2] by a chain of selects, which a vector unit takes and a gather does not."""
    half = len(levels) // 2
    mirrored = all(math.isclose(low, -high) for low, high in zip(levels, levels[::-1], strict=True))
    if not mirrored or half < 2:
        found = jnp.full(codes.shape, levels[0], jnp.float32)
        for index in range(1, len(levels)):
            found = jnp.where(codes >= index - half, levels[index], found)
        return found
    size = jnp.where(codes >= 0, codes, -1 - codes)
    found = jnp.full(codes.shape, levels[half], jnp.float32)
    for index in range(1, half):
        found = jnp.where(size >= index, levels[half + index], found)
    return jnp.where(codes >= 0, found, -found)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("parts", "basis", "mean"),
    meta_fields=("frequencies", "factor"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotated:
    """Keys from before RoPE: read, taken back to D numbers and turned at their slots' positions.

    Attributes:
      parts: R numbers a slot, `B k S R`; the K heads share k of them.
      basis: `K R D` or `B K R D`, or None where R is D and the numbers are the key's own.
      mean: `K D` or `B K D`, added before the turn, or None.
      frequencies: of the D/2 bands, radians per token; band f turns the numbers f and f + D/2.
      factor: what RoPE multiplies keys with.
    """

    parts: tuple[Coded, ...]
    basis: Any
    mean: Any
    frequencies: tuple[float, ...]
    factor: float = 1.0

    @property
    def num_slots(self) -> int:
        """S."""
        return self.parts[0].num_slots

    @property
    def num_heads(self) -> int:
        """K, the heads that come out."""
        return self.parts[0].num_heads if self.basis is None else self.basis.shape[-3]

    @property
    def alignment(self) -> int:
        """Blocks of slots begin and end at multiples of this."""
        return math.lcm(*(part.alignment for part in self.parts))

    def map_tokens(self, function: Callable[..., Any], *others: "Rotated") -> "Rotated":
        """See `Coded.map_tokens`."""
        parts = tuple(
            part.map_tokens(function, *[other.parts[index] for other in others])
            for index, part in enumerate(self.parts)
        )
        return dataclasses.replace(self, parts=parts)

    def read(self, positions: Int[Array, "B #K S"] | None = None) -> Float[Array, "B K S D"]:
        """The keys in float32, turned; `positions` may have one head for all."""
        keys = read_parts(self.parts, positions)
        if self.basis is not None:
            basis = self.basis[None] if self.basis.ndim == 3 else self.basis  # B|1 K R D
            basis = jnp.broadcast_to(basis, (keys.shape[0], *basis.shape[1:])).astype(jnp.float32)
            keys = jnp.repeat(keys, basis.shape[1] // keys.shape[1], axis=1)
            keys = jnp.einsum("BKSR,BKRD->BKSD", keys, basis)
        if self.mean is not None:
            keys = keys + (self.mean[None] if self.mean.ndim == 2 else self.mean)[:, :, None].astype(jnp.float32)
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        phases = positions.astype(jnp.float32)[..., None] * frequencies.reshape(1, 1, 1, -1)  # B K|1 S D/2
        cos, sin = jnp.cos(phases) * self.factor, jnp.sin(phases) * self.factor
        first, second = jnp.split(keys, 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


Part = Coded | Rotated
Parts = tuple[Part, ...]


def read_parts(parts: Parts, positions: Int[Array, "B #K S"] | None = None) -> Float[Array, "B k S R"]:
    """All numbers of the slots, part after part, in float32."""
    numbers = [part.read(positions) for part in parts]
    return numbers[0] if len(numbers) == 1 else jnp.concatenate(numbers, axis=-1)


def slice_parts(parts: Parts, start: jax.Array | int, num_slots: int) -> Parts:
    """A block of slots; start and size are multiples of each part's `alignment`."""

    def cut(array: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        numerator, denominator = entries
        return jax.lax.dynamic_slice_in_dim(
            array, start * numerator // denominator, num_slots * numerator // denominator, axis=axis
        )

    return tuple(part.map_tokens(cut) for part in parts)


def alignment(parts: Parts) -> int:
    """Slots that blocks of these parts are multiples of."""
    return math.lcm(*(part.alignment for part in parts))
