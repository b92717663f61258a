"""How `mosaic_floats` takes parts of keys and values to the matrix unit: as floats that hold the codes exactly.

What is between a code and a number meets the rows, not the numbers (C groups of channels, or one):

    scores   x[q, s] = sum over C of  scale[c, s] (q_c . code[s] + shift sum(q_c)) + offset[c, s] sum(q_c)
    output   o[q, r] = sum over s of  w[q, s] scale[c, s] (code[s, r] + shift) + w[q, s] offset[c, s],  r in group c

so rows come C times, each with zeros outside its group. Where scales belong to channels (KIVI), numbers are scaled
instead. Codes need no rounding as bfloat16; queries and weights come as two bfloat16, what the first lacks in the
second. Codes keep the order of tokens: the hardware reads the bytes of a tile as twice as many rows of 4 bits, or four
times as many of 2, and for single bits a byte is parted twice:

    byte        hgfedcba     ->     0 0 dc 0 0 ba, then   000d000c 000b000a     two rows each time, low half first

Loading numbers is what keeps the matrix unit busy, as rows are few, and 8 bits are loaded in half the time of 16. Where
a chip multiplies bfloat16 with floats of 8 bits, those go in as they are stored, and codes of 4 bits at most as e4m3,
which holds them exactly. To put two heads beside each other saves no load: a load fills the width with slots.

Levels of a table are looked up by one instruction a tile: 16 of 16 bits, or 8 of 32 where chips have no other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas._tpu import LANES, beside, in_each_byte, of_half, picked
from kernels_pallas.coded import Coded, plane_bits

CHUNK = 256
"""Slots that go to the matrix unit together: those of a tile of single bits."""
_MADE_OF_CODES = "float8_e4m3fn"  # by one instruction
_OTHER_BIAS = "float8_e4m3b11fnuz"  # the same bits stand for a 16th, but those of -0 for NaN
_SMALL = 4  # bits of codes that an 8-bit float with three bits behind the first holds exactly
_HALF_ROWS = 16  # float16 numbers of a tile's column


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the kernel's body is written for, of one part.

    Attributes:
      size: R.
      plain: whether numbers are floats as they are.
      turned: whether slots are on lanes: so XLA lays out what has less than 128 numbers, which would else fill no tile.
      dtype: in which they go to the matrix unit.
      bits: of a code; None for floats.
      float8: name of the 8-bit float that bytes are, or "".
      levels: what codes stand for, the lowest first, or None.
      short: whether 16 levels of 16 bits are looked up at once, and not 8 of 32.
      shift: added to each code, or to each level.
      groups: C, of channels with a scale each; 0 without scales that belong to tokens.
      token_group: tokens that share a channel's scale, or 1.
      offset: whether there are offsets.
    """

    size: int
    plain: bool
    turned: bool
    dtype: str
    bits: int | None
    float8: str
    levels: tuple[float, ...] | None
    short: bool
    shift: float
    groups: int
    token_group: int
    offset: bool

    @classmethod
    def of(cls, part: Coded, *, short: bool, native: tuple[str, ...] = ()) -> "Layout":
        """Of a part, on a chip that looks levels of 16 bits up, or does not.

        Args:
          part: arrays, or their shapes.
          short: see the attribute.
          native: floats of 8 bits that the matrix unit takes beside bfloat16.
        """
        plain = part.bits is None and not part.dtype
        groups = 0
        if part.scale is not None and part.token_group == 1:
            groups = 1 if part.scale.ndim == 3 else part.scale.shape[2]
        shift, dtype = part.shift, str(part.planes[0].dtype) if plain else _operand(part, native)
        if part.bits is not None and part.levels is None and not _signed(part.bits, dtype):
            shift -= 1 << (part.bits - 1)
        return cls(
            size=part.planes[0].shape[3],
            plain=plain,
            turned=plain and part.planes[0].shape[3] < LANES,
            dtype=dtype,
            bits=part.bits,
            float8=part.dtype,
            levels=part.levels,
            short=short,
            shift=shift,
            groups=groups,
            token_group=part.token_group,
            offset=part.offset is not None,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane; of floats nothing is packed."""
        return (8,) if self.bits is None else plane_bits(self.bits)

    @property
    def slot_bytes(self) -> float:
        """What a slot of a head takes, scales apart."""
        return float(self.size * (8 * jnp.dtype(self.dtype).itemsize if self.plain else sum(self.widths)) / 8)

    @property
    def unit(self) -> float:
        """What numbers are multiplied with that go to the matrix unit as floats of another bias."""
        return 16.0 if self.dtype == _OTHER_BIAS else 1.0

    @property
    def copies(self) -> int:
        """Times that the Q rows come: for each group of channels, in two bfloat16 unless numbers are floats anyway."""
        return 1 if self.plain else 2 * max(self.groups, 1)

    @property
    def multiple(self) -> int:
        """Slots that blocks are multiples of, so that all arrays' blocks are whole tiles."""
        return CHUNK if self.token_group == 1 else max(CHUNK, _HALF_ROWS * self.token_group)


def _operand(part: Coded, native: tuple[str, ...]) -> str:
    """Dtype in which numbers that are not plain go to the matrix unit: 8 bits fill it in half the time of 16."""
    if part.dtype in native:
        return part.dtype
    if part.dtype == "float8_e4m3fn" and _OTHER_BIAS in native:
        return _OTHER_BIAS
    small = part.bits is not None and part.bits <= _SMALL and part.levels is None and part.token_group == 1
    return _MADE_OF_CODES if small and _MADE_OF_CODES in native else "bfloat16"


def _signed(bits: int, dtype: str) -> bool:
    """Whether codes are read as they are: of one plane, and not of single bits; nor of two where they become bytes."""
    return bits in ((8, 4, 2) if dtype == "bfloat16" else (8, 4))


@dataclasses.dataclass(frozen=True)
class Refs:
    """Where a step finds one part of some heads.

    Attributes:
      planes: `1 heads bytes R` each, or `1 heads R S` where they are turned.
      table: `16 128`, see `table_of`; None without.
      scale: float32 `heads S`, cleaned (see `clean`), where a token has one scale; the bits of float16 `1 heads C S` or
        `1 heads S/t R`; None without.
      offset: the same.
    """

    planes: tuple[Any, ...]
    table: Any
    scale: Any
    offset: Any


@dataclasses.dataclass(frozen=True)
class OfHead:
    """What lies between a head's codes and its numbers, None without: `C S` or `S/t R`, float32.

    Or the array `heads S` in fast memory, and the number of the head, where tokens have a scale each.
    """

    scale: Any
    offset: Any


def of_head(layout: Layout, refs: Refs, head: Any, seen: Bool[Array, "1 S"] | None) -> OfHead:
    """Scales and offsets of a head, 0 where no query sees the slot: what lies there may be NaN."""

    def read(ref: Any) -> Any:
        if ref is None or layout.groups == 1:
            return None if ref is None else (ref, head) if isinstance(head, int) else ref[pl.ds(head, 1)]
        found = of_float16(ref[0, head])
        return found if layout.token_group > 1 else jnp.where(seen, found, 0.0)

    return OfHead(read(refs.scale), read(refs.offset))


def _row(own: Any, group: int, slots: slice, count: int) -> Float[Array, "_ _"]:
    """What slots have for a group of channels, on `count` rows or one.

    A load puts one row of a tile onto all of them; the compiler takes it of a head whose number is known to it.
    """
    if isinstance(own, jax.Array):
        return own[group : group + 1, slots]
    ref, head = own
    tiles = [ref[pl.ds(head, 1), pl.ds(start, LANES)] for start in range(slots.start, slots.stop, LANES)]
    return beside([jnp.broadcast_to(tile, (count, LANES)) for tile in tiles], 1)


def scores(
    layout: Layout, rows: Float[Array, "_ R"], sums: Any, own: OfHead, codes: Float[Array, "..."], start: int
) -> Float[Array, "Q S"]:
    """Products of rows with the numbers that codes stand for.

    Args:
      layout: of the part.
      rows: queries, see `Layout.copies`.
      sums: `C Q 1`, of each query's numbers in each group; None if there is nothing to add.
      own: of the head.
      codes: of some slots from `start` on, see `numbers`.
      start: in the block.
    """
    products = multiply(layout, rows, codes)
    if layout.plain:
        return products
    count = rows.shape[0] // layout.copies
    by_group = [_both(products, group, count) for group in range(layout.copies // 2)]
    return meet(layout, by_group, sums, own, slice(start, start + codes.shape[0]))


def multiply(layout: Layout, rows: Float[Array, "_ R"], codes: Float[Array, "..."]) -> Float[Array, "_ S"]:
    """Products of any rows with what `numbers` gives."""
    exact = jax.lax.Precision.HIGHEST if codes.dtype == jnp.float32 else None
    across = (((1,), (0 if layout.turned else 1,)), ((), ()))
    return jax.lax.dot_general(rows, codes, across, precision=exact, preferred_element_type=jnp.float32)


def meet(
    layout: Layout, products: list[Float[Array, "Q S"]], sums: Any, own: OfHead, slots: slice
) -> Float[Array, "Q S"]:
    """Products with codes, of each group of channels, as products with the numbers that these stand for."""
    total = None
    for group, found in enumerate(products):
        if layout.groups:
            if layout.shift:
                found = found + sums[group] * layout.shift
            found = found * _row(own.scale, group, slots, found.shape[0])
            if layout.offset:
                found = found + sums[group] * _row(own.offset, group, slots, found.shape[0])
        total = found if total is None else total + found
    return total


@dataclasses.dataclass
class Sums:
    """What the chunks of a block gave so far: products `_ R`, and what shifts and offsets add, `Q S` a group."""

    products: Any = None
    added: Any = None


def weigh(layout: Layout, weights: Float[Array, "Q S"], own: OfHead, codes: Any, start: int, sums: Sums) -> None:
    """Adds the weighted codes of some slots to `sums`."""
    if layout.plain:
        exact = jax.lax.Precision.HIGHEST if codes.dtype == jnp.float32 else None
        across = (((1,), (1 if layout.turned else 0,)), ((), ()))
        weights = weights.astype(codes.dtype)
        products = jax.lax.dot_general(weights, codes, across, precision=exact, preferred_element_type=jnp.float32)
    else:
        slots, rows, added = slice(start, start + codes.shape[0]), [], []
        for group in range(layout.copies // 2):
            scaled = weights * _row(own.scale, group, slots, weights.shape[0]) if layout.groups else weights
            rows += split(scaled)
            if adds(layout):
                offset = weights * _row(own.offset, group, slots, weights.shape[0]) if layout.offset else None
                added.append(scaled if offset is None else scaled * layout.shift + offset)
        products = jnp.dot(jnp.concatenate(rows, axis=0), codes, preferred_element_type=jnp.float32)
        if adds(layout):
            sums.added = (
                added if sums.added is None else [one + new for one, new in zip(sums.added, added, strict=True)]
            )
    sums.products = products if sums.products is None else sums.products + products


def finish(layout: Layout, sums: Sums) -> Float[Array, "Q R"]:
    """The weighted numbers of a block."""
    if layout.plain:
        return sums.products
    groups = layout.copies // 2
    count, total = sums.products.shape[0] // layout.copies, None
    lane = jax.lax.broadcasted_iota(jnp.int32, (count, layout.size), 1)
    for group in range(groups):
        found = _both(sums.products, group, count)
        if layout.unit != 1:
            found = found * layout.unit
        if adds(layout):
            added = jnp.sum(sums.added[group], axis=1, keepdims=True)
            found = found + (added if layout.offset else added * layout.shift)
        total = found if total is None else jnp.where(lane < group * layout.size // groups, total, found)
    return total


def split(numbers: Float[Array, "..."]) -> list[Float[Array, "..."]]:
    """Two bfloat16 that come to a float32 within 2**-17 of it."""
    high = numbers.astype(jnp.bfloat16)
    return [high, (numbers - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def _both(products: Float[Array, "_ R"], group: int, count: int) -> Float[Array, "Q R"]:
    """What the two bfloat16 of a group's Q rows come to."""
    first = 2 * group * count
    return products[first : first + count] + products[first + count : first + 2 * count]


def adds(layout: Layout) -> bool:
    """Whether shifts or offsets are added, which take the sums of queries and of weights."""
    return layout.groups > 0 and (layout.shift != 0 or layout.offset)


def numbers(layout: Layout, refs: Refs, own: OfHead, head: Any, start: int, count: int) -> Float[Array, "..."]:
    """What some slots of a head hold, as it goes to the matrix unit: numbers, or codes where scales meet the rows.

    `S R`, or `R S` where slots are on lanes.
    """
    if layout.turned:
        return refs.planes[0][0, head, :, pl.ds(start, count)]
    if layout.bits is None:
        found = refs.planes[0][0, head, pl.ds(start, count)]
        if layout.plain:
            return found
        if layout.dtype == _OTHER_BIAS:
            return pltpu.bitcast(without_signs_of_zero(_words(found)), jnp.dtype(layout.dtype))
        return pltpu.bitcast(found, jnp.dtype(layout.float8)).astype(jnp.dtype(layout.dtype))
    planes = [
        (width, ref[0, head, pl.ds(start * width // 8, count * width // 8)])
        for width, ref in zip(layout.widths, refs.planes, strict=True)
    ]
    if layout.levels is not None:
        codes = _look_up(_indices(planes, layout), layout, refs.table)
    elif _signed(layout.bits, layout.dtype):
        codes = _rows(planes[0][1], planes[0][0])
    elif layout.dtype != "bfloat16":
        codes = _rows(pltpu.bitcast(_nibbles(planes) ^ in_each_byte(0x11 << (layout.bits - 1)), jnp.int8), 4)
    else:
        codes = pltpu.bitcast(
            _fields(planes) ^ in_each_byte(1 << (layout.bits - 1)), jnp.int8
        )  # counted from the lowest
    if layout.dtype != "bfloat16":
        return codes.astype(jnp.int8).astype(jnp.dtype(layout.dtype))
    if layout.token_group == 1:
        return codes.astype(jnp.bfloat16)
    return _scaled(codes.astype(jnp.float32), layout, own, start).astype(jnp.bfloat16)


def without_signs_of_zero(words: Int[Array, "_ R"]) -> Int[Array, "_ R"]:
    """Four bytes of floats in a word, 0 where they are -0."""
    below = in_each_byte(0x7F)
    some = (words & below) + below  # the sign of each byte says whether any bit below it is 1
    return words & (some | below)


def _rows(plane: Int[Array, "_ R"], width: int) -> Int[Array, "S R"]:
    """Codes of a plane in the order of tokens, as signed integers of 8, 4 or 2 bits."""
    return plane if width == 8 else pltpu.bitcast(plane, {4: jnp.int4, 2: jnp.int2}[width])


def _words(array: Int[Array, "S R"]) -> Int[Array, "_ R"]:
    """Bytes of four rows in a word."""
    return pltpu.bitcast(array.astype(jnp.int8), jnp.int32)


def _halves(words: Int[Array, "_ R"], bits: int) -> Int[Array, "_ R"]:
    """Bytes of 2 n bits as twice as many bytes whose lowest n bits count."""
    return _words(_rows(pltpu.bitcast(_parted(words, bits), jnp.int8), 4))


def _parted(words: Int[Array, "_ R"], bits: int) -> Int[Array, "_ R"]:
    """Bytes of 2 n bits with n of them in each half."""
    low, high = (1 << bits) - 1, ((1 << bits) - 1) << bits
    return (words & in_each_byte(low)) | ((words & in_each_byte(high)) << (4 - bits))


def _fields(planes: list[tuple[int, jax.Array]]) -> Int[Array, "_ R"]:
    """Codes as they are packed, without a sign, bytes of four rows in a word."""
    whole, low = None, 0
    for width, plane in planes:
        words = _halves(_halves(_words(_rows(plane, 4)), 2), 1) if width == 1 else _words(_rows(plane, width))
        part = (words & in_each_byte((1 << width) - 1)) << low
        whole = part if whole is None else whole | part
        low += width
    return whole


def _nibbles(planes: list[tuple[int, jax.Array]]) -> Int[Array, "_ R"]:
    """The same for codes of less than 4 bits, two to a byte."""
    whole, low = None, 0
    for width, plane in planes:
        words = _words(_rows(plane, 4))
        part = (_parted(words, 2) if width == 2 else _parted(_halves(words, 2), 1)) << low
        whole = part if whole is None else whole | part
        low += width
    return whole


def table_of(layout: Layout) -> Float[Array, "16 128"] | Int[Array, "16 128"]:
    """Levels by the bits of their codes, those from 0 on first, on each lane: float32, or the bits of bfloat16."""
    half = len(layout.levels) // 2
    ordered = layout.levels[half:] + layout.levels[:half] + (0.0,) * (16 - 2 * half)
    table = jnp.broadcast_to(jnp.asarray(ordered, jnp.float32)[:, None], (16, LANES))
    return table.astype(jnp.bfloat16).view(jnp.int16) if layout.short else table


def _indices(planes: list[tuple[int, jax.Array]], layout: Layout) -> Int[Array, "S R"]:
    """Where in a table each code's level stands, in as many bits as the levels."""
    wide = jnp.int16 if layout.short else jnp.int32
    if layout.widths == (4,) or layout.widths == (2,):
        return _rows(planes[0][1], planes[0][0]).astype(wide) & ((1 << layout.bits) - 1)
    return pltpu.bitcast(_fields(planes), jnp.int8).astype(wide)


def _look_up(indices: Int[Array, "S R"], layout: Layout, table: jax.Ref) -> Float[Array, "S R"]:
    """Levels of codes, a tile of the hardware at a time."""
    slots, size = indices.shape
    rows, lanes = 16 if layout.short else 8, min(size, LANES)
    tables = [table[first : first + rows, :lanes] for first in range(0, len(layout.levels), rows)]

    def tile(row: int, lane: int) -> jax.Array:
        index = indices[row : row + rows, lane : lane + lanes]
        within, width = index & (rows - 1) if len(tables) > 1 else index, index.shape[1]
        found = [picked(one[:, :width], within, 0) for one in tables]
        return found[0] if len(found) == 1 else jnp.where(index < rows, *found)

    levels = [beside([tile(row, lane) for lane in range(0, size, lanes)], 1) for row in range(0, slots, rows)]
    whole = beside(levels, 0)
    return pltpu.bitcast(whole, jnp.bfloat16) if layout.short else whole


def _scaled(codes: Float[Array, "S R"], layout: Layout, own: OfHead, start: int) -> Float[Array, "S R"]:
    """Codes times what their channels have for their group of tokens."""
    group, found = layout.token_group, []
    for first in range(0, codes.shape[0], group):
        row = (start + first) // group
        part = codes[first : first + group] + layout.shift
        part = part * own.scale[row : row + 1]
        found.append(part + own.offset[row : row + 1] if layout.offset else part)
    return jnp.concatenate(found, axis=0)


def of_float16(bits: Int[Array, "..."]) -> Float[Array, "..."]:
    """Float16 numbers from their bits."""
    word = bits.astype(jnp.int32)
    size = of_half((word & 0x7FFF) << 13)
    return jnp.where(word < 0, -size, size)
