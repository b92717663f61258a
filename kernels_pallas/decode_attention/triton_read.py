"""How the GPU kernel reads one part of a segment, block by block: numbers, scales and offsets of the slots.

    block   I rows of n tokens, as many as share a byte; field j is the token n i + j of each row i
    piece   channels that a product takes at once; where an element holds two (`triton_words`), the even or the odd ones

What two tokens or channels share is read once, as 32 bits where that are two float16: the chip copies ahead of time
whatever is no less.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.coded import Coded, look_up, plane_bits
from kernels_pallas.decode_attention import triton_words

LEAST = 16  # of two sides of a matrix product
_WIDEST = 128  # piece of a vector
_SMALLEST = 2.0**-24  # scale in float16


class Piece(NamedTuple):
    """Channels that a product takes at once.

    Attributes:
      start: of their elements.
      size: how many channels, a power of two.
      place: of the first one among all channels of all parts.
      parity: which of the two channels of an element; None where it is one.
    """

    start: int
    size: int
    place: int
    parity: int | None = None

    @property
    def where(self) -> pl.Slice:
        """Where the channels lie among all: each, or every second."""
        return pl.ds(self.place, self.size, 1 if self.parity is None else 2)


Groups = tuple[tuple[Piece, ...], ...]
"""Pieces of each group of channels that share scales."""


def groups_of(part: Coded, first: int = 0) -> Groups:
    """How the channels of a part are cut; places begin at `first`."""
    count = num_groups(part)
    size = part.planes[0].shape[3] // count
    return tuple(pieces_of(size * index, size, first=first, words=in_words(part)) for index in range(count))


def groups_of_all(parts: tuple[Coded, ...]) -> tuple[Groups, ...]:
    """The same for parts that follow each other."""
    found, first = [], 0
    for part in parts:
        found.append(groups_of(part, first))
        first += part.planes[0].shape[3]
    return tuple(found)


def num_groups(part: Coded) -> int:
    """Groups of channels of a token that have scales of their own."""
    grouped = part.token_group == 1 and part.scale is not None and len(part.scale.shape) == 4
    return part.scale.shape[2] if grouped else 1


def in_words(part: Coded) -> bool:
    """Whether elements are two channels: even and odd ones have to be wide enough for a product."""
    wide = part.planes[0].shape[3] // num_groups(part) % (2 * LEAST) == 0
    halves = all(_is_half(array) for array in (part.scale, part.offset) if array is not None)
    return triton_words.possible(part) and wide and (part.token_group == 1 or halves)


def _is_half(array: Any) -> bool:
    return array.dtype == jnp.float16


def pieces_of(start: int, width: int, *, first: int, words: bool) -> tuple[Piece, ...]:
    """Powers of two that make up a width, the largest first: 80 = 64 + 16."""
    found: list[Piece] = []
    end = start + width
    while start < end:
        elements = (end - start) // 2 if words else end - start
        size = min(1 << (elements.bit_length() - 1), _WIDEST // 2 if words else _WIDEST)
        if words:
            found += [Piece(start // 2, size, first + start + parity, parity) for parity in (0, 1)]
        else:
            found.append(Piece(start, size, first + start))
        start += 2 * size if words else size
    return tuple(found)


def num_fields(part: Coded) -> int:
    """Tokens that share a byte of the finest plane."""
    return 1 if part.bits is None else 8 // min(plane_bits(part.bits))


def in_fields(part: Coded, fields: int) -> Coded:
    """With one axis of heads, and fields: planes `heads I _ R`, scales of tokens `heads [C] I n`.

    No byte moves. Elements are two channels where a part is `in_words`; two float16 scales or offsets are an int32.
    """
    widths = (8,) if part.bits is None else plane_bits(part.bits)
    words = in_words(part)
    planes = (
        plane.reshape(-1, plane.shape[2] * 8 // (fields * width), fields * width // 8, plane.shape[3])
        for plane, width in zip(part.planes, widths, strict=True)
    )

    def lay_out(array: jax.Array | None) -> jax.Array | None:
        if array is None:
            return None
        if part.token_group > 1:
            array = array.reshape(-1, *array.shape[2:])
            return array.view(jnp.int32) if words else array
        array = array.reshape(-1, *array.shape[2:-1], array.shape[-1] // fields, fields)
        return array.view(jnp.int32) if fields > 1 and _is_half(array) else array

    return dataclasses.replace(
        part,
        planes=tuple(plane.view(jnp.int16) if words else plane for plane in planes),
        scale=lay_out(part.scale),
        offset=lay_out(part.offset),
    )


def dtype_of(part: Coded) -> Any:
    """The dtype in which numbers are multiplied."""
    return jnp.float16 if part.bits is not None or part.dtype else part.planes[0].dtype


def table_of(part: Coded) -> Float[Array, "1 levels"] | None:
    """What the bits of a code stand for, for all heads, if one read is less than choosing among the levels."""
    if part.levels is None or part.bits < 3 or in_words(part):
        return None
    return jnp.asarray([triton_words.levels_of(part)], jnp.float32).astype(dtype_of(part))


def unit_of(part: Coded, groups: Groups) -> float:
    """What numbers come in multiples of, before scales."""
    words = groups[0][0].parity is not None
    return triton_words.UNIT if words and _are_integers(part) and part.token_group == 1 else 1.0


def _are_integers(part: Coded) -> bool:
    """Whether codes stand for themselves."""
    return part.bits is not None and part.levels is None


def has(part: Coded, name: str) -> bool:
    """Whether a part has scales or offsets that belong to tokens."""
    return part.token_group == 1 and getattr(part, name) is not None


class Field(NamedTuple):
    """A token of each row of a block.

    Attributes:
      index: which.
      visible: which query rows see it, `I Q`, or `I 1` where that is the same for all.
      seen: whether any does, `I`.
    """

    index: int
    visible: Bool[Array, "slots #Q"]
    seen: Bool[Array, "slots"]


class Slots:
    """The slots of a block, in rows of `fields` tokens.

    Attributes:
      index: of each row, where keys and values are stored.
      fields: tokens of a row.
      where: the rows in the order in which they are read.
      inside: which of them there are; None if all.
    """

    def __init__(self, start: jax.Array, size: int, count: int, fields: int, pages: Any = None, page: int = 0):
        index = start + jnp.arange(size, dtype=jnp.int32)
        self.index, self.fields, self.where = jnp.minimum(index, count - 1), fields, pl.ds(start, size)
        self.inside = index < count if count % size else None
        self._paged = pages is not None
        if pages is not None:
            rows = jnp.full_like(self.index, page // fields)
            found = jnp.maximum(pages[jax.lax.div(self.index, rows)], 0)
            self.index = found * rows + jax.lax.rem(self.index, rows)

    def load(self, ref: jax.Ref, index: int, *, fill: int = 0) -> jax.Array:
        """Entries of the rows in the order in which they are read, `I`; `fill` behind the last one."""
        return load(ref, self.inside, self.where, index, fill=fill)

    def stored(self, ref: jax.Ref, *index: Any, before: tuple[int, ...] = ()) -> jax.Array:
        """Entries of the rows of keys or values, `I ...`; anything behind the last one."""
        if self._paged:
            return load(ref, None, *before, self.index, *index)
        return load(ref, self.inside, *before, self.where, *index)

    def store(self, ref: jax.Ref, value: Float[Array, "slots"], *index: Any) -> None:
        """Writes entries of the rows that are there."""
        if self.inside is None:
            ref[(self.where, *index)] = value
        else:
            index = tuple(map(jnp.int32, index))
            pltriton.store(ref.at[(self.where, *index)], value, mask=self.inside)

    def field(self, positions: jax.Ref, index: int, query_positions: Int[Array, "Q"], *, num_tokens: int) -> Field:
        """Who sees the tokens of a field."""
        found = self.load(positions, index, fill=-1)
        present = found >= 0
        seen = present & (found <= jnp.max(query_positions))
        if num_tokens == 1:
            return Field(index, seen[:, None], seen)
        return Field(index, present[:, None] & (found[:, None] <= query_positions[None, :]), seen)


def load(ref: jax.Ref, inside: jax.Array | None, *index: Any, fill: int = 0) -> jax.Array:
    """Part of an array; `fill` in the rows, the first of its axes, that are not inside."""
    if inside is None:
        return ref[index]
    index = tuple(jnp.int32(one) if isinstance(one, int) else one for one in index)  # interpreted, it wants arrays
    shape = ref.at[index].shape
    mask = inside if len(shape) == 1 else jnp.broadcast_to(inside[:, None], shape)
    return pltriton.load(ref.at[index], mask=mask, other=jnp.asarray(fill, ref.dtype))


class Reader:
    """A block of one part; what fields or channels share is read once."""

    def __init__(self, part: Coded, groups: Groups, table: jax.Ref | None, *, slots: Slots, interpret: bool):
        self.part, self.groups, self.dtype, self.unit = part, groups, dtype_of(part), unit_of(part, groups)
        self._slots, self._table = slots, table
        self._interpret = interpret
        self._held: dict[Any, jax.Array] = {}

    def of_tokens(self, name: str, field: Field, group: int) -> Float[Array, "slots"] | None:
        """A field's scales or offsets of a group of channels; None if there are none, or they are in the numbers."""
        if not has(self.part, name):
            return None
        ref = getattr(self.part, name)
        before = (group,) if len(ref.shape) == 3 else ()
        pairs = ref.dtype == jnp.int32
        entry = field.index // 2 if pairs else field.index
        found = self._hold((name, group, entry), lambda: self._slots.stored(ref, entry, before=before))
        found = _half(found, field.index % 2) if pairs else found
        return jnp.where(field.seen, found.astype(jnp.float32), 0.0)

    def numbers(self, field: Field, piece: Piece) -> Float[Array, "slots R"]:
        """A field's numbers before scales and offsets of tokens, in `unit`s; anything where a slot is empty."""
        part = self.part
        if piece.parity is not None:
            found = self._made(self._planes(field, piece), field.index, piece.parity)
        elif part.dtype:  # a byte is the low half of an element
            found = self._made((self._elements(0, field.index, piece).astype(jnp.int16),), 0, 0)
        else:
            found = self._elements(0, field.index, piece) if part.bits is None else self._levels(field, piece)
        if part.token_group > 1:
            if piece.parity is not None and _are_integers(part):
                found = found * jnp.float16(1 / triton_words.UNIT)
            exact = self.dtype if piece.parity is not None or part.scale.dtype == self.dtype else jnp.float32
            found = found.astype(exact) * self._of_channels("scale", piece).astype(exact)
            if part.offset is not None:
                found = found + self._of_channels("offset", piece).astype(exact)
            found = found.astype(self.dtype)
        return found

    def clean(self, field: Field, piece: Piece) -> Float[Array, "slots R"]:
        """The same, and 0 where a slot is empty: 0 times NaN is not 0."""
        found = self.numbers(field, piece)
        floats = self.part.bits is None and self.part.dtype != "float8_e4m3fn"  # which is read as finite
        if floats or self.part.token_group > 1:  # no others can be NaN
            found = jnp.where(field.seen[:, None], found, jnp.zeros_like(found))
        return found

    def _hold(self, key: Any, read: Any) -> jax.Array:
        if key not in self._held:
            self._held[key] = read()
        return self._held[key]

    def _elements(self, plane: int, entry: int, piece: Piece) -> jax.Array:
        """Of a plane: numbers, bytes, or two bytes."""
        key, where = (plane, entry, piece.start, piece.size), pl.ds(piece.start, piece.size)
        return self._hold(key, lambda: self._slots.stored(self.part.planes[plane], entry, where))

    def _planes(self, field: Field, piece: Piece) -> tuple[jax.Array, ...]:
        """The elements of all planes that hold a field."""
        widths = plane_bits(self.part.bits) if self.part.bits else (8,)
        return tuple(self._elements(plane, field.index * width // 8, piece) for plane, width in enumerate(widths))

    def _made(self, elements: tuple[jax.Array, ...], entry: int, parity: int) -> Float[Array, "slots R"]:
        """A field's numbers of the even or the odd channels."""
        recipe = triton_words.recipe_for(self.part, entry, parity)
        return triton_words.numbers(elements, recipe, interpret=self._interpret)

    def _levels(self, field: Field, piece: Piece) -> Float[Array, "slots R"]:
        """What a field's codes stand for, one by one."""
        part, half = self.part, 1 << (self.part.bits - 1)
        codes = self._codes(field, piece)
        if self._table is not None:
            return self._table[codes]
        codes = (codes ^ half) - half
        found = codes.astype(jnp.float32) if part.levels is None else look_up(codes, part.levels)
        return (found + part.shift if part.shift else found).astype(self.dtype)

    def _codes(self, field: Field, piece: Piece) -> Int[Array, "slots R"]:
        """A field's codes from all planes, as int32 without a sign."""
        bytes_ = [plane.astype(jnp.int32) for plane in self._planes(field, piece)]
        return triton_words.together(bytes_, triton_words.moves_of(self.part, field.index))

    def _of_channels(self, name: str, piece: Piece) -> Float[Array, "slots R"]:
        """Each row's scales or offsets, which its fields share."""
        ref = getattr(self.part, name)

        def read() -> jax.Array:
            rows = self.part.token_group // self._slots.fields
            group = jax.lax.div(self._slots.index, jnp.full_like(self._slots.index, rows))
            return ref[group, pl.ds(piece.start, piece.size)]

        found = self._hold((name, piece.start, piece.size), read)
        return found if piece.parity is None else _half(found, piece.parity)


def scaled(scores: Float[Array, "slots Q"], readers: list[Reader], field: Field) -> Float[Array, "slots Q"]:
    """Scores of which 2 to the power is the largest scaled weight, or half of it: what float16 must have room for.

    What is added is a whole number, so that of the largest weight no digit is lost when it is rounded.
    """
    with_scales = [reader for reader in readers if has(reader.part, "scale")]
    if not with_scales:
        return scores
    least = _SMALLEST if len(with_scales) == len(readers) else 1.0
    scales = [
        jnp.abs(reader.of_tokens("scale", field, group))
        for reader in with_scales
        for group in range(len(reader.groups))
    ]
    largest = jnp.maximum(functools.reduce(jnp.maximum, scales), least)
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127
    return scores + exponent.astype(jnp.float32)[:, None]


def _half(pairs: Int[Array, "..."], parity: int) -> Float[Array, "..."]:
    """The low or the high float16 of 32 bits."""
    return jax.lax.bitcast_convert_type((pairs >> (16 * parity)).astype(jnp.int16), jnp.float16)
