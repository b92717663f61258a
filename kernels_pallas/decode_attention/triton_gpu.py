"""Decode attention over one segment on an NVIDIA GPU: each stored head is read once, for all of its queries.

    grid (blocks of query rows, B k, splits of the live slots); the splits' results are merged by XLA in float32

    rows   Q = (N / k) T queries of a stored head      scores [S Q] = keys x rows,  output [R Q] = values x weights
           (slots and channels are the long side of a product, queries the short one, of which 8 are enough)
    fields codes of b bits are n = 8/b neighbouring tokens a byte: a tile of bytes is read once, and its field j is a
           tile of the tokens n i + j. Softmax does not mind the order of slots, so fields are never interleaved.
    words  two channels are an element; even and odd ones are multiplied apart (`triton_words`). Codes become float16,
           which holds integers and 8-bit floats exactly; other floats stay what they are, float32 in full.

Scales and offsets of tokens go to scores and weights, those of groups of channels to the group's part of them, those of
a channel of a token group alone to the keys and values. A scaled weight is below 2**15, as float16 has no room for
more: what is held back is the maximum of the scaled ones. Sums over slots are kept slot by slot until the end, so that
a step has one reduction, the maximum. Which slots count is said by positions; blocks behind the last live slot are not
read. Rows of pages are read from where a list says that they are stored. What lies in a slot that does not count may be
NaN: scores, scales and values are selected.

Pallas has deprecated its Triton route since JAX 0.11: only the choice of `api.py` depends on this file.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.coded import Coded, Parts
from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Running, Segment, live_slots
from kernels_pallas.decode_attention.triton_read import (
    LEAST,
    Field,
    Groups,
    Reader,
    Slots,
    channels,
    dtype_of,
    groups_of_all,
    has,
    in_fields,
    in_words,
    load,
    num_fields,
    num_groups,
    scaled,
    table_of,
    unit_of,
)

_MASKED = -1e30
_LEAST_UNIT = 1e-6  # of a row of queries
_EXPONENT = 0x7F800000  # of a float32
_NOTHING = -1e15  # the maximum of no slot: above what is masked in any unit, so that its weights are 0
_FEWEST_ROWS = 8  # of queries in a product
_MOST_ROWS = 256  # of a head; a prompt's chunks are read by XLA
_MOST_GROUPS = 8  # of channels; each is code of its own
_WARPS = 2112  # sixteen on each of 132 multiprocessors
_LIFT = 14  # float16 weights are up to 2**14, so that small ones are not lost


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a segment is cut.

    Attributes:
      fields: n, tokens of a row: as many as share a byte of the finest plane.
      rows: of a block.
      query_rows: of a program.
      splits: programs that share a head's live slots.
      key_groups: channels of each part of the keys that share scales, each group in pieces.
      value_groups: those of the values.
      lift: the largest weight is 2 to this power.
      num_warps: of a program.
      num_stages: of loads ahead.
      owner_rows: rows of queries of a key/value head where heads share a pool of slots, else 0.
      page: slots of a page where pages are read, else 0.
    """

    fields: int
    rows: int
    query_rows: int
    splits: int
    key_groups: tuple[Groups, ...]
    value_groups: tuple[Groups, ...]
    lift: int
    num_warps: int
    num_stages: int
    owner_rows: int = 0
    page: int = 0


def plan_for(
    keys: Parts, values: Parts, *, num_rows: int, num_heads: int, num_slots: int | None = None, page: int = 0
) -> Plan:
    """A plan for Q rows of queries and B k heads: it fills the device, and next to no register is spilled on Hopper.

    Of the slots that are stored `num_slots` are read, if they come in pages of `page`.

    Codes in words are worked on by many programs of one warp, which wait for nobody: on an H200 a fifth faster than
    half as many of two. Floats are waited for, whatever the plan.
    """
    parts, groups = (*keys, *values), (groups_of_all(keys), groups_of_all(values))
    fields, dtypes = max(map(num_fields, parts)), [part.planes[0].dtype for part in parts]
    width = _power(max(128, *(sum(part.planes[0].shape[3] for part in side) for side in (keys, values)))) // 128
    query_rows, many = max(_power(num_rows), _FEWEST_ROWS), max(len(one) for side in groups for one in side) > 1
    if all(map(in_words, parts)):
        counts = (page or keys[0].num_slots, *(part.token_group for part in parts if part.token_group > 1))
        fields = max(fields, 1 if any(count % 2 for count in counts) else 2)  # scales of two tokens are 32 bits
        query_rows = min(query_rows, max(64 // width, _FEWEST_ROWS))
        warps = min(query_rows * width // _FEWEST_ROWS, 8)
        rows = 32 if fields <= 2 or warps > 2 else 16
        stages = 2 if many or any(part.dtype or part.bits == 8 for part in keys) else 3
    else:
        single = jnp.float32 in dtypes or many or all(dtype == jnp.int8 for dtype in dtypes)  # many registers for one
        query_rows = min(query_rows, 16 if single else max(64 // width, _FEWEST_ROWS))
        rows, warps = (16, 2 * width) if fields > 1 else (64 // width, 4)
        rows = 16 if jnp.float32 in dtypes else 32 if width > 2 else rows
        warps = 8 if jnp.float32 in dtypes or width > 2 or (single and width > 1) else min(warps, 8)
        stages = 3 if all(dtype == jnp.int8 for dtype in dtypes) else 2
    blocks = -(-(num_slots or keys[0].num_slots) // (fields * rows))
    programs = num_heads * -(-num_rows // query_rows)
    return Plan(
        fields=fields,
        rows=rows,
        query_rows=query_rows,
        splits=max(min(_WARPS // max(warps, 2) // programs, blocks), 1),
        key_groups=groups[0],
        value_groups=groups[1],
        lift=_LIFT if any(dtype_of(part) == jnp.float16 for part in values) else 0,
        num_warps=warps,
        num_stages=stages,
        page=page,
    )


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def unsupported(segment: Segment, device: str) -> str | None:
    """Why a segment cannot be served; None if it can.

    Args:
      segment: arrays, or their shapes.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if not device.startswith("NVIDIA"):
        return f"it runs on NVIDIA GPUs, and this is {device}"
    for name, parts in (("keys", segment.keys), ("values", segment.values)):
        if not all(isinstance(part, Coded) for part in parts):
            return f"{name} are turned when they are read"
        if reasons := [reason for part in parts if (reason := _unsupported_part(part)) is not None]:
            return f"{name} {reasons[0]}"
        if (count := sum(map(num_groups, parts))) > _MOST_GROUPS:
            return f"{name} have {count} groups of channels, more than {_MOST_GROUPS}"
    parts, stored = (*segment.keys, *segment.values), segment.keys[0].num_heads
    if segment.positions.shape[1] not in (1, stored):
        return "heads that hold tokens of their own share stored keys"
    if any(part.num_heads != stored for part in parts):
        return "keys and values are not of as many heads"
    if segment.owners is not None and stored > 1:
        return "a pool has several stored heads"
    fields = max(map(num_fields, parts))
    if any(part.token_group % fields for part in parts if part.token_group > 1):
        return f"groups of tokens divide the {fields} tokens that share a byte"
    if segment.pages is not None and segment.pages.shape[1] != stored:
        return "pages are not of as many heads as keys and values"
    if segment.page % fields:
        return f"pages of {segment.page} slots part the {fields} tokens that share a byte"
    rows = segment.queries.shape[1] * segment.queries.shape[2] // stored
    return f"{rows} queries share a head, more than {_MOST_ROWS}" if rows > _MOST_ROWS else None


def _unsupported_part(part: Coded) -> str | None:
    plane, count = part.planes[0], num_groups(part)
    if part.dtype not in ("", "float8_e4m3fn", "float8_e5m2"):
        return f"are of {part.dtype}"
    if part.bits is None and not part.dtype:
        if plane.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"are of {plane.dtype}"
        if part.scale is not None:
            return "are floats with scales"
    if part.scale is None and (part.offset is not None or part.token_group > 1):
        return "have offsets or groups of tokens without scales"
    if plane.shape[3] // count % LEAST:
        return f"have {plane.shape[3] // count} numbers that share a scale, no multiple of {LEAST}"
    # Offsets of up to 4 GiB are 32-bit integers, which have a sign: enough for elements of two bytes. Over a mesh each
    # device has fewer, down to where that matters.
    many = plane.dtype.itemsize == 1 and not in_words(part) and math.prod(plane.shape) >= 2**31
    return "take 2 GiB or more as single bytes" if many else None


def walk(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    scale: float,
    *,
    mesh: Mesh | None = None,
    interpret: Any = False,
) -> Running:
    """Attention over one segment; see `reference.decode_attention`.

    Args:
      segment: one that is not `unsupported`.
      query_positions: `B T` int32.
      scale: of the scores.
      mesh: over which the arrays lie, see `api.decode_attention`; each device runs the kernel on what it has.
      interpret: run on any device, step by step.

    Returns:
      Unscaled output, maximum and sum of weights. The maximum may differ from the largest score by a number, which
      output and sum make up for.
    """
    function = functools.partial(_walk, scale=scale, interpret=interpret)
    return over_mesh(function, segment, query_positions, mesh)


class _Arrays(NamedTuple):
    """What the kernel reads; heads are B k of them, slots I fields of n, numbers in the order of `channels`."""

    queries: Any  # heads Q R
    bias: Any  # heads Q, or None
    query_positions: Any  # B T; row q is of token q mod T
    keys: Parts  # see `in_fields`
    values: Parts
    positions: Any  # heads I n, or B I n
    owners: Any  # heads I n, or None
    pages: Any  # heads count, or None
    live: Any  # B, slots up to the last one that is seen
    tables: tuple[tuple[Any, ...], ...]  # what codes of each part of keys and values stand for, or None


def _walk(segment: Segment, query_positions: Int[Array, "B T"], *, scale: float, interpret: Any) -> Running:
    """`walk` on what one device holds."""
    queries, keys, values, bias = segment.queries, segment.keys, segment.values, segment.bias
    positions = segment.positions
    batch, num_tokens, num_heads, stored = *queries.shape[:3], keys[0].num_heads
    total, count = batch * stored, num_heads // stored * num_tokens
    sizes = {"num_slots": positions.shape[2], "page": segment.page}
    plan = plan_for(keys, values, num_rows=count, num_heads=total, **sizes)
    if segment.owners is not None:
        plan = dataclasses.replace(plan, owner_rows=count // segment.num_kv_heads)

    def as_rows(array: jax.Array) -> jax.Array:
        return jnp.swapaxes(array, 1, 2).reshape(total, count, *array.shape[3:])

    arrays = _Arrays(
        _reordered(as_rows(queries), channels(plan.key_groups)),
        None if bias is None else as_rows(bias),
        query_positions,
        tuple(in_fields(part, plan.fields) for part in keys),
        tuple(in_fields(part, plan.fields) for part in values),
        _of_fields(positions, plan.fields),
        None if segment.owners is None else _of_fields(segment.owners, plan.fields),
        None if segment.pages is None else segment.pages.reshape(total, -1),
        live_slots(query_positions, positions),
        tuple(tuple(map(table_of, parts)) for parts in (keys, values)),
    )
    output, maximum, sums = _call(arrays, scale=scale * math.log2(math.e), plan=plan, interpret=interpret)
    # JAX's own kernel for decoding holds its maxima back like this: fused with what follows they came out invalid.
    largest = jax.lax.optimization_barrier(jnp.max(maximum, axis=1))  # heads Q
    decay = jnp.exp2(maximum - largest[:, None])  # heads splits Q

    def as_heads(array: jax.Array) -> jax.Array:
        return array[:, :count].reshape(batch, num_heads, num_tokens, *array.shape[2:])

    output, sums = jnp.sum(output * decay[:, :, None], axis=1), jnp.sum(sums * decay, axis=1)
    order = channels(plan.value_groups)
    output = _reordered(jnp.swapaxes(output, 1, 2), sorted(range(len(order)), key=order.__getitem__))
    return as_heads(output), as_heads(largest * math.log(2.0)), as_heads(sums)


def _of_fields(array: Int[Array, "B K S"], fields: int) -> Int[Array, "heads rows _"]:
    """With one axis of heads, and fields."""
    return array.reshape(-1, array.shape[2] // fields, fields)


def _reordered(array: Float[Array, "heads Q R"], order: list[int]) -> Float[Array, "heads Q R"]:
    """Numbers in another order."""
    return array if order == sorted(order) else array[..., jnp.asarray(order)]


def _call(arrays: _Arrays, *, scale: float, plan: Plan, interpret: Any) -> tuple[jax.Array, ...]:
    """Output `heads splits R Q`, maximum and sum of weights `heads splits Q`; Q in whole blocks."""
    heads, num_rows = arrays.queries.shape[:2]
    stored, blocks = heads // arrays.live.shape[0], -(-num_rows // plan.query_rows)

    def of_head(array: jax.Array) -> pl.BlockSpec:
        """What all programs of a head see of an array `heads ...`, or `B ...` where heads share it."""
        own, rest = array.shape[0] == heads, (0,) * (array.ndim - 1)
        return pl.BlockSpec(
            (None, *array.shape[1:]), lambda block, head, split: (head if own else jax.lax.div(head, stored), *rest)
        )

    def of_split(*sizes: int) -> pl.BlockSpec:
        size, rest = (None, None, *sizes, plan.query_rows), (0,) * len(sizes)
        return pl.BlockSpec(size, lambda block, head, split: (head, split, *rest, block))

    specs = jax.tree.map(of_head, arrays._replace(tables=None))
    whole = jax.tree.map(lambda table: pl.BlockSpec(table.shape, lambda *_: (0,)), arrays.tables)
    width, shape = len(channels(plan.value_groups)), (heads, plan.splits)
    sizes = [(*shape, *rest, blocks * plan.query_rows) for rest in ((width,), (), ())]
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, plan=plan, interpret=bool(interpret)),
        grid=(blocks, heads, plan.splits),  # programs that share slots beside each other
        in_specs=[specs._replace(tables=whole)],
        out_specs=[of_split(width), of_split(), of_split()],
        out_shape=[jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes],
        compiler_params=pltriton.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(arrays)


def _kernel(
    arrays: _Arrays, output: jax.Ref, maximum: jax.Ref, total: jax.Ref, *, scale: float, plan: Plan, interpret: bool
) -> None:
    """One split of a head's slots, for some of its rows of queries."""
    split, size, slots = pl.program_id(2), plan.query_rows, plan.fields * plan.rows
    blocks = jax.lax.div(arrays.live[...] + (slots - 1), slots)
    groups = [
        (part, group) for part, of_part in zip(arrays.values, plan.value_groups, strict=True) for group in of_part
    ]
    state = _State(
        tuple(jnp.zeros((piece.size, size), jnp.float32) for _, group in groups for piece in group),
        tuple(jnp.zeros((plan.rows, size), jnp.float32) for part, _ in groups if has(part, "offset")),
        jnp.full((size,), _NOTHING, jnp.float32),
        jnp.zeros((plan.rows, size), jnp.float32),
    )
    each = jax.lax.div(blocks + (plan.splits - 1), plan.splits)
    rows = _rows_of(arrays, scale=scale, plan=plan)
    step = functools.partial(_add_block, rows=rows, arrays=arrays, plan=plan, interpret=interpret)
    state = jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, blocks), step, state)
    outputs, offsets = iter(state.outputs), iter(state.offsets)
    for part, group in groups:
        offset = jnp.sum(next(offsets), axis=0)[None, :] if has(part, "offset") else None
        for piece in group:
            found = next(outputs) * (1 / unit_of(part, (group,)))
            output[pl.ds(piece.place, piece.size), :] = found if offset is None else found + offset
    maximum[...] = state.maximum - plan.lift
    total[...] = jnp.sum(state.total, axis=0)


class _Rows(NamedTuple):
    """Rows of queries."""

    pieces: list[list[list[jax.Array]]]  # Q R as they are multiplied, for each part and group of the keys' channels
    sums: list[list[jax.Array]]  # Q of each part and group
    factor: jax.Array  # Q, what makes products scores in units of ln 2
    bias: jax.Array | None  # Q, of such scores
    positions: jax.Array  # Q, -1 where there is no query
    heads: jax.Array  # Q, of the key/value heads that share a pool
    num_tokens: int  # T


def _rows_of(arrays: _Arrays, *, scale: float, plan: Plan) -> _Rows:
    """Reads the queries; beside codes in units of each row's largest number, for which float16 has room.

    A unit is a power of 2: no digit is lost.
    """
    (count, _), size = arrays.queries.shape, plan.query_rows
    start = pl.program_id(0) * size
    index = start + jnp.arange(size, dtype=jnp.int32)
    inside = None if count % size == 0 else index < count

    def piece_of(place: int, length: int) -> jax.Array:
        return load(arrays.queries, inside, pl.ds(start, size), pl.ds(place, length)).astype(jnp.float32)

    pieces = [[[piece_of(piece.place, piece.size) for piece in group] for group in part] for part in plan.key_groups]
    sums = [[sum(jnp.sum(piece, axis=1) for piece in group) for group in part] for part in pieces]
    factor = jnp.full((size,), scale, jnp.float32)
    dtypes = [dtype_of(part) for part in arrays.keys]
    if jnp.float16 in dtypes:
        peaks = [jnp.max(jnp.abs(piece), axis=1) for part in pieces for group in part for piece in group]
        peak = jnp.maximum(functools.reduce(jnp.maximum, peaks), _LEAST_UNIT)
        unit = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(peak, jnp.int32) & _EXPONENT, jnp.float32)
        pieces = jax.tree.map(lambda piece: piece / unit[:, None], pieces)
        sums = jax.tree.map(lambda found: found / unit, sums)
        factor = factor * unit
    bias = None
    if arrays.bias is not None:
        bias = load(arrays.bias, inside, pl.ds(start, size)).astype(jnp.float32) * scale
    num_tokens = arrays.query_positions.shape[0]
    positions = arrays.query_positions[jax.lax.rem(index, jnp.full_like(index, num_tokens))]
    positions = positions if inside is None else jnp.where(inside, positions, -1)
    pieces = [
        [[piece.astype(dtype) for piece in group] for group in part] for part, dtype in zip(pieces, dtypes, strict=True)
    ]
    heads = jax.lax.div(index, jnp.full_like(index, plan.owner_rows or count))
    return _Rows(pieces, sums, factor, bias, positions, heads, num_tokens)


class _State(NamedTuple):
    """What a program has found; sums over slots are kept field by field, `I Q`."""

    outputs: tuple[jax.Array, ...]  # R Q of each piece
    offsets: tuple[jax.Array, ...]  # I Q of each group: weights times offsets
    maximum: jax.Array  # Q, in units of ln 2, of scaled weights
    total: jax.Array  # I Q: weights


def _add_block(block: jax.Array, state: _State, *, rows: _Rows, arrays: _Arrays, plan: Plan, interpret: bool) -> _State:
    """Adds a block of slots: the scores of all fields, their maximum, then field by field what the weights give."""
    slots = Slots(block * plan.rows, plan.rows, *arrays.positions.shape, arrays.pages, plan.page)
    fields = [_field(index, slots, arrays, rows) for index in range(plan.fields)]
    read = functools.partial(Reader, slots=slots, interpret=interpret)
    keys = list(map(read, arrays.keys, plan.key_groups, arrays.tables[0]))
    values = list(map(read, arrays.values, plan.value_groups, arrays.tables[1]))
    scores = [_scores(keys, field, rows) for field in fields]
    of_weights = [scaled(score, values, field) for score, field in zip(scores, fields, strict=True)]
    new = jnp.maximum(state.maximum, jnp.max(functools.reduce(jnp.maximum, of_weights), axis=0))
    decay = jnp.exp2(state.maximum - new)[None, :]
    state = jax.tree.map(lambda found: found * decay, state._replace(maximum=None))
    for field, score in zip(fields, scores, strict=True):
        weights = jnp.exp2(score - (new - plan.lift)[None, :])
        if not any(has(part, "scale") for part in arrays.values):  # what is added up is what is multiplied
            weights = weights.astype(values[0].dtype).astype(jnp.float32)
        outputs, offsets = _add_field(values, field, weights, state)
        state = _State(outputs, offsets, None, state.total + weights)
    return state._replace(maximum=new)


def _field(index: int, slots: Slots, arrays: _Arrays, rows: _Rows) -> Field:
    """A token of each row of slots, and which queries see it."""
    field = slots.field(arrays.positions, index, rows.positions, num_tokens=rows.num_tokens)
    if arrays.owners is None:
        return field
    owned = slots.load(arrays.owners, index)[:, None] == rows.heads[None, :]
    return field._replace(visible=field.visible & owned)


def _scores(keys: list[Reader], field: Field, rows: _Rows) -> Float[Array, "slots Q"]:
    """Scores of a field in units of ln 2."""
    scores = None
    for part, (reader, of_part) in enumerate(zip(keys, rows.pieces, strict=True)):
        for index, group in enumerate(of_part):
            pairs = zip(group, reader.groups[index], strict=True)
            products = sum(_product(reader.numbers(field, piece), row, (1, 1)) for row, piece in pairs)
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


def _product(left: jax.Array, right: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Matrix product in float32 over an axis of each; float32 in full, not rounded to 10 bits."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    dimensions = (axes[:1], axes[1:]), ((), ())
    return jax.lax.dot_general(left, right, dimensions, precision=exact, preferred_element_type=jnp.float32)


def _add_field(
    values: list[Reader], field: Field, weights: Float[Array, "slots Q"], state: _State
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Outputs and what offsets come to, with what a field's weights give."""
    before, so_far, outputs, offsets = iter(state.outputs), iter(state.offsets), [], []
    for reader in values:
        for index, group in enumerate(reader.groups):
            if (offset := reader.of_tokens("offset", field, index)) is not None:
                offsets.append(next(so_far) + weights * offset[:, None])
            scale = reader.of_tokens("scale", field, index)
            shares = (weights if scale is None else weights * scale[:, None]).astype(reader.dtype)
            outputs += [next(before) + _product(reader.clean(field, piece), shares, (0, 0)) for piece in group]
    return tuple(outputs), tuple(offsets)
