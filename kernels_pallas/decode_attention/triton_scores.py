"""Scores on an NVIDIA GPU: what a head's queries and the keys of a block of slots give, and how both are laid out.

Attention (`triton_gpu`) and masses (`triton_mass`) begin with this. Slots are rows of fields, and queries the short
side of the products: see `triton_gpu`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels_pallas._gpu import power
from kernels_pallas.coded import Parts
from kernels_pallas.decode_attention.reference import Segment
from kernels_pallas.decode_attention.triton_read import (
    Field,
    Groups,
    Reader,
    Slots,
    dtype_of,
    in_fields,
    table_of,
)

_MASKED = -1e30
_LEAST_UNIT = 1e-6  # of a row of queries
_EXPONENT = 0x7F800000  # of a float32
_FEW_SLOTS = 1024  # that a program looks through by itself
_STRETCH, _FEWEST_STRETCHES = 256, 16  # of slots


class Asked(NamedTuple):
    """What makes scores, as a kernel reads it: heads are those of queries, slots I fields of n."""

    queries: Any  # heads Q R
    bias: Any  # heads Q, or None
    query_positions: Any  # B T; row q is of token q mod T
    keys: Parts  # `B k ...`, see `in_fields`
    tables: tuple[Any, ...]  # what codes of each part of the keys stand for, or None
    positions: Any  # B k I n, or B I n
    owners: Any  # B I n, or None
    pages: Any  # B k count, or None: where the slots' keys are stored
    live: Any  # B k P, or B P: the largest is one past the last slot that is seen; None if positions are few


def asked_of(segment: Segment, query_positions: Int[Array, "B T"], *, fields: int, heads: int) -> Asked:
    """Lays a segment's queries and keys out.

    Args:
      segment: one that is not `triton_gpu.unsupported`.
      query_positions: `B T` int32.
      fields: n.
      heads: of all sequences, among which the rows of queries are shared out.
    """
    keys, bias = segment.keys, segment.bias
    return Asked(
        queries=as_rows(jnp.swapaxes(segment.queries, 1, 2), heads),
        bias=None if bias is None else as_rows(jnp.swapaxes(bias, 1, 2), heads),
        query_positions=query_positions,
        keys=tuple(in_fields(part, fields) for part in keys),
        tables=tuple(map(table_of, keys)),
        positions=_of_fields(segment.positions, fields),
        owners=None if segment.owners is None else _of_fields(segment.owners, fields),
        pages=None if segment.pages is None else segment.pages.reshape(-1, segment.pages.shape[2]),
        live=_live_of(query_positions, segment.positions),
    )


def as_rows(array: Float[Array, "B N T ..."], heads: int) -> Float[Array, "heads Q ..."]:
    """Query heads and tokens as rows of each head."""
    return array.reshape(heads, -1, *array.shape[3:])


def _of_fields(array: Int[Array, "B K S"], fields: int) -> Int[Array, "heads rows _"]:
    """With one axis of heads, and fields."""
    return array.reshape(-1, array.shape[2] // fields, fields)


def _live_of(query_positions: Int[Array, "B T"], positions: Int[Array, "B K S"]) -> Int[Array, "heads _"] | None:
    """One past the last slot that is seen in each of P stretches of a head's slots.

    XLA takes two kernels for one number, one for these, and none for positions that a program looks at by itself.
    """
    count = positions.shape[2]
    if count <= _FEW_SLOTS:
        return None
    stretches = min(max(power(count // _STRETCH), _FEWEST_STRETCHES), _FEW_SLOTS)
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    slots = jnp.arange(count, dtype=jnp.int32)[None, None, :]
    live = jnp.where((positions >= 0) & (positions <= newest), slots + 1, 0).reshape(-1, count)
    live = jnp.pad(live, ((0, 0), (0, -count % stretches)))
    return jnp.max(live.reshape(live.shape[0], stretches, -1), axis=2)


def live_blocks(asked: Asked, size: int) -> Int[Array, ""]:
    """Blocks of so many slots up to the last slot of a head that any query sees."""
    if asked.live is not None:
        live = jnp.max(asked.live[...])
    else:
        rows, fields = asked.positions.shape
        index = jnp.arange(power(rows * fields), dtype=jnp.int32)
        row, field = jax.lax.div(index, jnp.full_like(index, fields)), jax.lax.rem(index, jnp.full_like(index, fields))
        found = asked.positions[jnp.minimum(row, rows - 1), field]
        newest = jnp.max(_all_of(asked.query_positions))
        live = jnp.max(jnp.where((found >= 0) & (found <= newest) & (row < rows), index + 1, 0))
    return jax.lax.div(live + (size - 1), size)


def _all_of(ref: jax.Ref) -> Int[Array, "_"]:
    """An array of any length, its last number repeated up to a power of 2, as tiles want it."""
    return ref[jnp.minimum(jnp.arange(power(ref.shape[0]), dtype=jnp.int32), ref.shape[0] - 1)]


def specs_of(arrays: Any, heads: int, *, axis: int) -> Any:
    """What all programs of a head see: of an array `heads ...` its own, of one with fewer what heads beside it share.

    Args:
      arrays: any tree of them.
      heads: of all sequences.
      axis: of the grid, that counts heads.
    """

    def of_head(array: jax.Array) -> pl.BlockSpec:
        sharing, rest = heads // array.shape[0], (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda *index: (jax.lax.div(index[axis], sharing), *rest))

    return jax.tree.map(of_head, arrays)


class Rows(NamedTuple):
    """Rows of queries; those behind the last one repeat it, and are at position -1."""

    where: Any  # Q, of which they are
    pieces: list[list[list[jax.Array]]]  # Q R as they are multiplied, for each part and group of the keys' channels
    sums: list[list[jax.Array]]  # Q of each part and group
    factor: jax.Array  # Q, what makes products scores in units of ln 2
    bias: jax.Array | None  # Q, of such scores
    positions: jax.Array  # Q, -1 where there is no query
    owners: jax.Array  # Q, of the key/value heads that share a pool
    num_tokens: int  # T
    inside: jax.Array | None  # Q, where there is a query; None if everywhere


def rows_of(
    asked: Asked, start: Any, *, size: int, groups: tuple[Groups, ...], scale: float, owner_rows: int = 0
) -> Rows:
    """Reads queries; beside codes in units of each row's largest number, for which float16 has room.

    A unit is a power of 2: no digit is lost.

    Args:
      asked: what a program sees.
      start: the first row.
      size: how many.
      groups: see `triton_read.groups_of_all`.
      scale: of scores in units of ln 2.
      owner_rows: that belong to one key/value head where heads share a pool of slots, else 0.
    """
    count = asked.queries.shape[0]
    index = start + jnp.arange(size, dtype=jnp.int32)
    whole = count % size == 0
    inside, where = (None, pl.ds(start, size)) if whole else (index < count, jnp.minimum(index, count - 1))
    pieces = [
        [[asked.queries[where, piece.where].astype(jnp.float32) for piece in group] for group in part]
        for part in groups
    ]
    sums = [[sum(jnp.sum(piece, axis=1) for piece in group) for group in part] for part in pieces]
    factor = jnp.full((size,), scale, jnp.float32)
    dtypes = [dtype_of(part) for part in asked.keys]
    if jnp.float16 in dtypes:
        unit = _unit_of([piece for part in pieces for group in part for piece in group])
        pieces = jax.tree.map(lambda piece: piece / unit[:, None], pieces)
        sums = jax.tree.map(lambda found: found / unit, sums)
        factor = factor * unit
    bias = None if asked.bias is None else asked.bias[where].astype(jnp.float32) * scale
    num_tokens = asked.query_positions.shape[0]
    positions = asked.query_positions[jax.lax.rem(index, jnp.full_like(index, num_tokens))]
    positions = positions if inside is None else jnp.where(inside, positions, -1)
    pieces = [
        [[piece.astype(dtype) for piece in group] for group in part] for part, dtype in zip(pieces, dtypes, strict=True)
    ]
    owners = jax.lax.div(index, jnp.full_like(index, owner_rows or count))
    return Rows(where, pieces, sums, factor, bias, positions, owners, num_tokens, inside)


def _unit_of(pieces: list[Float[Array, "Q _"]]) -> Float[Array, "Q"]:
    """The power of 2 at or below the largest number of each row."""
    peaks = [jnp.max(jnp.abs(piece), axis=1) for piece in pieces]
    peak = jnp.maximum(functools.reduce(jnp.maximum, peaks), _LEAST_UNIT)
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(peak, jnp.int32) & _EXPONENT, jnp.float32)


def field_of(index: int, slots: Slots, asked: Asked, rows: Rows) -> Field:
    """A token of each row of slots, and which queries see it."""
    field = slots.field(asked.positions, index, rows.positions, num_tokens=rows.num_tokens)
    if asked.owners is None:
        return field
    owned = slots.load(asked.owners, index)[:, None] == rows.owners[None, :]
    return field._replace(visible=field.visible & owned)


def scores_of(keys: list[Reader], field: Field, rows: Rows) -> Float[Array, "slots Q"]:
    """Scores of a field in units of ln 2; far below any other where a query does not see a slot."""
    scores = None
    for part, (reader, of_part) in enumerate(zip(keys, rows.pieces, strict=True)):
        for index, group in enumerate(of_part):
            pairs = zip(group, reader.groups[index], strict=True)
            products = sum(product(reader.numbers(field, piece), row, (1, 1)) for row, piece in pairs)
            if (scale := reader.of_tokens("scale", field, index)) is not None:
                products = products * (scale * (1 / reader.unit))[:, None]
            elif reader.unit != 1:
                products = products * (1 / reader.unit)
            if (offset := reader.of_tokens("offset", field, index)) is not None:
                products = products + offset[:, None] * rows.sums[part][index][None, :]
            scores = products if scores is None else scores + products
    # Selected before they are multiplied: what is a product and a sum afterwards is one instruction.
    scores = jnp.where(field.visible, scores, _MASKED) * rows.factor[None, :]
    return scores if rows.bias is None else scores + rows.bias[None, :]


def product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product in float32 over an axis of each; float32 in full, not rounded to 10 bits."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (axes[:1], axes[1:]), ((), ())
    return jax.lax.dot_general(left, right, dimensions, precision=exact, preferred_element_type=jnp.float32)
