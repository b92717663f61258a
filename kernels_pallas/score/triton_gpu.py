"""Scores on an NVIDIA GPU: a program owns blocks of slots of a stored head, and reads their keys once for both terms.

    grid (blocks of query rows, B k, splits of the live blocks); behind the last live slot zeros are written

    first term    products of what is stored with rows, as attention's scores (`triton_scores`)
    second term   lengths sqrt(x_f^2 + x_{f+D/2}^2) times weights, x in tiles of slots by bands, one a half:

        as they are     pieces of channels f beside pieces of f + D/2, as they are read; even and odd bands apart
        turned back     numbers x A^T, a half of A's rows at a time; A's columns lie piece by piece as numbers come

Scales of tokens go to products, and where a token has but one, to what its lengths come to. Where numbers of a key do
not pair up by pieces, they are turned back by an identity matrix. A has the dtype of the numbers, in units of its
largest number, for which float16 has room. Lengths and weights are multiplied with 10 bits behind the point (TF32).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import triton_gpu as attention
from kernels_pallas.decode_attention.triton_gpu import Plan
from kernels_pallas.decode_attention.triton_read import (
    LEAST,
    Field,
    Groups,
    Piece,
    Reader,
    Slots,
    dtype_of,
    has,
    in_words,
    num_groups,
    pieces_of,
)
from kernels_pallas.decode_attention.triton_scores import (
    Asked,
    Rows,
    asked_of,
    field_of,
    live_blocks,
    product,
    rows_of,
    scores_of,
    specs_of,
)
from kernels_pallas.score.reference import StoredKeys

_MOST_NUMBERS, _MOST_TURNED = 256, 128  # D: two tiles of D / 2 are in registers, and what makes them
_MOST_ROWS = 16  # of queries at once
_MOST_BANDS, _FEW_BANDS = 64, 16  # whose numbers a program has at once, with A held and without
_MOST_FIELDS = 4  # tokens a row beside which a program keeps A
_NEVER = (1 << 31) - 2  # a position that all tokens come before
_WARPS = 1056  # eight on each of 132 multiprocessors


def unsupported(keys: StoredKeys, num_heads: int, device: str) -> str | None:
    """Why keys cannot be scored; None if they can.

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if not keys.positions.shape[2]:
        return "there are no slots"
    size = sum(part.planes[0].shape[3] for part in keys.parts if isinstance(part, Coded))
    queries = jax.ShapeDtypeStruct((keys.positions.shape[0], 1, num_heads, size), jnp.float32)
    if (reason := attention.unsupported(keys.segment(queries), device)) is not None:
        return reason
    own = (keys.basis is not None and keys.basis.ndim > 2) or keys.mean is not None
    if own and keys.parts[0].num_heads != keys.num_kv_heads:
        return "heads share what is stored, and turn it back each in its own way"
    if any(part.planes[0].dtype == jnp.float32 for part in keys.parts) and _pairs_of(keys) is None:
        return "keys are float32 and turned back"  # what TF32 wants of A has no room in registers
    size, most = keys_size(keys), _MOST_NUMBERS if _pairs_of(keys) is not None else _MOST_TURNED
    if size > most or size % 2:
        return f"keys have {size} numbers, more than {most} or an odd number"
    return None


class _Pair(NamedTuple):
    """Channels f and f + D/2, of which each tile of numbers is one half, and the groups of scales that they have."""

    pieces: tuple[Piece, Piece]
    groups: tuple[int, int]


def _pairs_of(keys: StoredKeys) -> tuple[_Pair, ...] | None:
    """How numbers that are the keys' own pair up; None if they are not, or do not."""
    part, count = keys.parts[0], num_groups(keys.parts[0])
    size, words = part.planes[0].shape[3] // max(count, 2), in_words(part)
    ends_at_halves = count == 1 or count % 2 == 0
    if keys.basis is not None or len(keys.parts) > 1 or not ends_at_halves or size % (2 * LEAST if words else LEAST):
        return None
    cut = [pieces_of(size * index, size, first=0, words=words) for index in range(max(count, 2))]
    half, found = len(cut) // 2, []
    for index in range(half):
        groups = (0, 0) if count == 1 else (index, half + index)
        found += [_Pair(pieces, groups) for pieces in zip(cut[index], cut[half + index], strict=True)]
    return tuple(found)


def plan_for(keys: StoredKeys, num_heads: int, *, weighted: bool) -> Plan:
    """Attention's plan without values, but for what lengths want.

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      weighted: whether there is a second term.
    """
    total, parts = keys.positions.shape[0] * keys.parts[0].num_heads, keys.parts
    num_rows = num_heads // parts[0].num_heads
    plan = attention.plan_for(parts, (), num_rows=num_rows, num_heads=total)
    query_rows = min(plan.query_rows, _MOST_ROWS)
    pairs, rows, warps, groups = _pairs_of(keys), plan.rows, plan.num_warps, plan.key_groups
    stages = plan.num_stages
    if weighted and pairs is None:
        rows, warps, stages = 64, 4, stages if _held(keys, plan.fields) else 1
    elif weighted:
        groups = (_groups_of(pairs, num_groups(parts[0])),)
    blocks, programs = -(-parts[0].num_slots // (plan.fields * rows)), total * -(-num_rows // query_rows)
    splits = max(min(_WARPS // warps // programs, blocks), 1)
    return dataclasses.replace(
        plan,
        query_rows=query_rows,
        rows=rows,
        num_warps=warps,
        num_stages=stages,
        key_groups=groups,
        splits=splits,
    )


def keys_size(keys: StoredKeys) -> int:
    """D."""
    return sum(part.planes[0].shape[3] for part in keys.parts) if keys.basis is None else keys.basis.shape[-2]


def _held(keys: StoredKeys, fields: int) -> bool:
    """Whether a program has the registers to keep A beside what it reads."""
    simple = len(keys.parts) == 1 and num_groups(keys.parts[0]) == keys.parts[0].token_group == 1
    return simple and fields <= _MOST_FIELDS


def _groups_of(pairs: tuple[_Pair, ...], count: int) -> Groups:
    """The same pieces by the group that their scales are of."""
    both = [(group, piece) for pair in pairs for group, piece in zip(pair.groups, pair.pieces, strict=True)]
    return tuple(tuple(piece for group, piece in both if group == index) for index in range(count))


class _Back(NamedTuple):
    """What makes lengths; axes of sequences and heads have length 1 where all share it."""

    weights: Any  # B k Q bands
    basis: tuple[Any, ...]  # B k 2 bands R of each piece's channels; none where numbers are the keys' own
    sums: tuple[Any, ...]  # B k 2 bands of each group of channels, where parts have offsets
    mean: Any  # B k 2 bands, or None


class _Arrays(NamedTuple):
    """What the kernel reads; heads are B k of them."""

    asked: Asked
    rest: Any  # what rows lose as bfloat16, `heads Q R`; None beside other keys, or without a first term
    back: _Back | None  # None without a second term


def score(
    keys: StoredKeys,
    rows: Float[Array, "B N D"] | None,
    weights: Float[Array, "#B N half"] | None,
    *,
    interpret: Any = False,
) -> Float[Array, "B N S"]:
    """See `reference.score`.

    Args:
      keys: not `unsupported`.
      rows: or None; one of both is given.
      weights: or None.
      interpret: run on any device, step by step.
    """
    batch, num_heads = keys.positions.shape[0], (weights if rows is None else rows).shape[1]
    plan = plan_for(keys, num_heads, weighted=weights is not None)
    stored, bias = None, None
    if rows is not None:
        stored, bias = keys.for_stored(rows)
    else:
        stored = jnp.zeros((batch, num_heads, sum(part.planes[0].shape[3] for part in keys.parts)), jnp.float32)
    segment = keys.segment(stored[:, None], None if bias is None else bias[:, None])
    heads = batch * keys.parts[0].num_heads
    never = jnp.full((batch, 1), _NEVER, jnp.int32)
    asked = asked_of(segment, never, fields=plan.fields, heads=heads)
    rest = None
    if rows is not None and all(dtype_of(part) == jnp.bfloat16 for part in keys.parts):
        rest = asked.queries - jax.lax.reduce_precision(asked.queries, 8, 7)
    arrays = _Arrays(asked, rest, None if weights is None else _back_of(keys, weights, plan))
    owner_rows = 0 if keys.owners is None else num_heads // keys.num_kv_heads
    plan = dataclasses.replace(plan, owner_rows=owner_rows)
    pairs = None if weights is None else _pairs_of(keys)
    found = _call(arrays, first=rows is not None, plan=plan, pairs=pairs, interpret=interpret)
    return found.reshape(batch, num_heads, -1)


def _back_of(keys: StoredKeys, weights: Float[Array, "#B N half"], plan: Plan) -> _Back:
    """Lays out what makes lengths. Bands are filled up with zeros to a multiple of `LEAST`."""
    mean = None if keys.mean is None else keys.mean.reshape(-1, *keys.mean.shape[-2:]).astype(jnp.float32)
    if mean is not None:
        mean = mean.reshape(*mean.shape[:2], 2, -1)
    weights = weights.reshape(weights.shape[0], keys.parts[0].num_heads, -1, weights.shape[2])
    if _pairs_of(keys) is not None:
        return _Back(weights, (), (), mean)
    size = sum(part.planes[0].shape[3] for part in keys.parts)
    basis = jnp.eye(size, dtype=jnp.float32) if keys.basis is None else keys.basis.astype(jnp.float32)
    unit = jnp.maximum(jnp.max(jnp.abs(basis)), 1e-30)
    basis = basis.reshape(*(1,) * (4 - basis.ndim), *basis.shape[:-2], 2, -1, size) / unit  # B k 2 bands R
    missing = -basis.shape[3] % LEAST
    basis = jnp.pad(basis, [(0, 0)] * 3 + [(0, missing), (0, 0)])
    if mean is not None:
        mean = jnp.pad(mean / unit, [(0, 0)] * 3 + [(0, missing)])
    weights = jnp.pad(weights * unit, [(0, 0)] * 3 + [(0, missing)])
    columns, sums = [], []
    for part, groups in zip(keys.parts, plan.key_groups, strict=True):
        for group in groups:
            own = [basis[..., _channels(piece)].astype(dtype_of(part)) for piece in group]
            columns += own
            if has(part, "offset"):
                sums.append(sum(jnp.sum(one.astype(jnp.float32), axis=-1) for one in own))
    return _Back(weights, tuple(columns), tuple(sums), mean)


def _channels(piece: Piece) -> slice:
    """Where a piece lies among all channels."""
    step = 1 if piece.parity is None else 2
    return slice(piece.place, piece.place + step * piece.size, step)


def _spec_of(array: jax.Array, heads: int, batch: int) -> pl.BlockSpec:
    """What programs see of an array that sequences, or heads, may share."""
    stored, (of_batch, of_heads, *rest) = heads // batch, array.shape
    zeros = (0,) * len(rest)

    def place(block: Any, head: Any, split: Any) -> tuple[Any, ...]:
        row = jax.lax.div(head, stored) if of_batch > 1 else 0
        return (row, jax.lax.rem(head, stored) if of_heads > 1 else 0, *zeros)

    return pl.BlockSpec((None, None, *rest), place)


def _call(
    arrays: _Arrays, *, first: bool, plan: Plan, pairs: tuple[_Pair, ...] | None, interpret: Any
) -> Float[Array, "heads Q rows n"]:
    """Runs the kernel; `first` says whether there is a first term."""
    heads, num_rows = arrays.asked.queries.shape[:2]
    batch = arrays.asked.query_positions.shape[0]
    slots = arrays.asked.positions.shape[1:]
    of_back = jax.tree.map(lambda array: _spec_of(array, heads, batch), arrays.back)
    return pl.pallas_call(
        functools.partial(_kernel, first=first, plan=plan, pairs=pairs, interpret=bool(interpret)),
        grid=(-(-num_rows // plan.query_rows), heads, plan.splits),
        in_specs=[_Arrays(*specs_of((arrays.asked, arrays.rest), heads, axis=1), of_back)],
        out_specs=pl.BlockSpec((None, num_rows, *slots), lambda block, head, split: (head, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, num_rows, *slots), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name="score",
    )(arrays)


def _kernel(
    arrays: _Arrays, found: jax.Ref, *, first: bool, plan: Plan, pairs: tuple[_Pair, ...] | None, interpret: bool
) -> None:
    """Some blocks of a head's slots."""
    split, asked = pl.program_id(2), arrays.asked
    start, count = pl.program_id(0) * plan.query_rows, asked.positions.shape[0]
    read_rows = functools.partial(rows_of, start=start, size=plan.query_rows, groups=plan.key_groups, scale=1.0)
    rows, rest = read_rows(asked, owner_rows=plan.owner_rows), None
    if arrays.rest is not None:
        rest = read_rows(asked._replace(queries=arrays.rest, bias=None))
    second = None
    if arrays.back is not None:
        second = (
            _paired(arrays.back, rows, pairs)
            if pairs is not None
            else _turned(arrays.back, rows, held=plan.num_stages > 1)
        )
    live = live_blocks(asked, plan.fields * plan.rows)
    each = jax.lax.div(live + (plan.splits - 1), plan.splits)

    def live_block(block: jax.Array, _: None) -> None:
        slots = Slots(block * plan.rows, plan.rows, *asked.positions.shape)
        read = functools.partial(_Once, slots=slots, interpret=interpret)
        keys = list(map(read, asked.keys, plan.key_groups, asked.tables))
        for index in range(plan.fields):
            field = field_of(index, slots, asked, rows)
            total = scores_of(keys, field, rows) if first else jnp.zeros((), jnp.float32)
            if rest is not None:
                total = total + scores_of(keys, field, rest)
            if second is not None:
                total = total + second(keys, field)
            _store(found, jnp.where(field.visible, total, 0.0), index, slots=slots, rows=rows, start=start)

    def dead_block(index: jax.Array, _: None) -> None:
        slots = Slots((live + split + index * plan.splits) * plan.rows, plan.rows, *asked.positions.shape)
        zeros = jnp.zeros((plan.rows, plan.query_rows), jnp.float32)
        for field in range(plan.fields):
            _store(found, zeros, field, slots=slots, rows=rows, start=start)

    jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, live), live_block, None)
    dead = jnp.maximum(-(-count // plan.rows) - live - split, 0)
    jax.lax.fori_loop(0, jax.lax.div(dead + (plan.splits - 1), plan.splits), dead_block, None)


class _Once(Reader):
    """Makes numbers once for both terms."""

    def numbers(self, field: Field, piece: Piece) -> Float[Array, "slots R"]:
        """See `Reader.numbers`."""
        return self._hold((field.index, piece), functools.partial(super().numbers, field, piece))


def _store(
    found: jax.Ref, total: Float[Array, "slots Q"], field: int, *, slots: Slots, rows: Rows, start: jax.Array
) -> None:
    """Writes the scores of a field, of the rows of queries and slots that there are."""
    at = found.at[pl.ds(start, total.shape[1]), slots.where, jnp.int32(field)]
    masks = [None if slots.inside is None else slots.inside[None, :]]
    masks += [None if rows.inside is None else rows.inside[:, None]]
    masks = [jnp.broadcast_to(mask, total.shape[::-1]) for mask in masks if mask is not None]
    pltriton.store(at, total.T, mask=functools.reduce(jnp.logical_and, masks) if masks else None)


def _paired(back: _Back, rows: Rows, pairs: tuple[_Pair, ...]) -> Any:
    """The second term of keys as they are stored, of a block's readers and a field."""
    weights = [back.weights[rows.where, pair.pieces[0].where] for pair in pairs]
    means = [
        None if back.mean is None else [back.mean[half, pair.pieces[0].where] for half in map(jnp.int32, (0, 1))]
        for pair in pairs
    ]

    def term(keys: list[Reader], field: Field) -> Float[Array, "slots Q"]:
        (reader,), total = keys, None
        late = back.mean is None and len(reader.groups) == 1 and not has(reader.part, "offset")
        for pair, weight, mean in zip(pairs, weights, means, strict=True):
            halves = [reader.numbers(field, piece).astype(jnp.float32) for piece in pair.pieces]
            if not late:
                halves = [_scaled(half, reader, field, group) for half, group in zip(halves, pair.groups, strict=True)]
                for half, group in enumerate(pair.groups):
                    if (offset := reader.of_tokens("offset", field, group)) is not None:
                        halves[half] = halves[half] + offset[:, None]
                    if mean is not None:
                        halves[half] = halves[half] + mean[half][None, :]
            found = _weighed(*halves, weight)
            total = found if total is None else total + found
        return _scaled(total, reader, field, 0, size=True) if late else total

    return term


def _turned(back: _Back, rows: Rows, *, held: bool) -> Any:
    """The second term of keys that are turned back, of a block's readers and a field.

    A stays with a program if it is `held`; else some bands of it at a time are read from the chip's cache.
    """
    bands, size = back.weights.shape[1], _bands_at_once(back.weights.shape[1], held=held)

    def read(start: Any) -> tuple[Any, ...]:
        piece = pl.ds(start, size)
        first, second = (functools.partial(lambda half, ref: ref[half, piece], half) for half in map(jnp.int32, (0, 1)))
        rest = back._replace(weights=None)
        return back.weights[rows.where, piece], [jax.tree.map(first, rest), jax.tree.map(second, rest)]

    tiles = list(map(read, range(0, bands, size))) if held else None

    def term(keys: list[Reader], field: Field) -> Float[Array, "slots Q"]:
        late = back.mean is None and not back.sums and sum(len(reader.groups) for reader in keys) == 1

        def add(weights: jax.Array, halves: list[_Back], total: Any) -> jax.Array:
            found = _weighed(*(_half_of(keys, field, half, late=late) for half in halves), weights)
            return found if total is None else total + found

        if held:
            total = None
            for tile in tiles:
                total = add(*tile, total)
        else:
            _make(keys, field)  # before the loop, which goes through A alone
            zeros = jnp.zeros((field.seen.shape[0], rows.factor.shape[0]), jnp.float32)
            total = jax.lax.fori_loop(0, bands // size, lambda index, total: add(*read(index * size), total), zeros)
        return _scaled(total, keys[0], field, 0, size=True) if late else total

    return term


def _bands_at_once(bands: int, *, held: bool) -> int:
    """A power of 2 that divides a multiple of `LEAST`."""
    return min(bands & -bands, _MOST_BANDS if held else _FEW_BANDS)


def _make(keys: list[Reader], field: Field) -> None:
    """Reads all that a field's lengths want."""
    for reader in keys:
        for index, group in enumerate(reader.groups):
            reader.of_tokens("scale", field, index)
            reader.of_tokens("offset", field, index)
            for piece in group:
                reader.numbers(field, piece)


def _half_of(keys: list[Reader], field: Field, back: _Back, *, late: bool) -> Float[Array, "slots half"]:
    """Numbers of one half of some bands; `late` leaves scales out."""
    columns, of_offsets, total = iter(back.basis), iter(back.sums), None
    for reader in keys:
        for index, group in enumerate(reader.groups):
            found = sum(_roughly(reader.numbers(field, piece), next(columns)) for piece in group)
            found = found if late else _scaled(found, reader, field, index)
            if (offset := reader.of_tokens("offset", field, index)) is not None:
                found = found + offset[:, None] * next(of_offsets)[None, :]
            total = found if total is None else total + found
    return total if back.mean is None else total + back.mean[None, :]


def _scaled(
    numbers: Float[Array, "slots _"], reader: Reader, field: Field, group: int, *, size: bool = False
) -> Float[Array, "slots _"]:
    """What is in units of numbers times their scale, or its size."""
    scale = reader.of_tokens("scale", field, group)
    if scale is None:
        return numbers if reader.unit == 1 else numbers * (1 / reader.unit)
    return numbers * ((jnp.abs(scale) if size else scale) * (1 / reader.unit))[:, None]


def _weighed(
    first: Float[Array, "slots half"], second: Float[Array, "slots half"], weights: Float[Array, "Q half"]
) -> Float[Array, "slots Q"]:
    """Weighted lengths."""
    return _roughly(jnp.sqrt(first * first + second * second), weights)


def _roughly(left: Float[Array, "slots _"], right: Float[Array, "_ _"]) -> Float[Array, "slots _"]:
    """The product with the right one's transpose; of float32 rounded to 10 bits behind the point."""
    if left.dtype != jnp.float32:
        return product(left, right, (1, 1))
    return jax.lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
