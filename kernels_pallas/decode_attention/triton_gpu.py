"""Decode attention over one segment on an NVIDIA GPU: each stored head is read once, for all of its queries.

    grid (blocks of query rows, B k, splits of the live slots); what splits find is put together (`triton_merge`)

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

from kernels_pallas._gpu import not_a_gpu, power
from kernels_pallas.coded import Coded, Parts
from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Running, Segment
from kernels_pallas.decode_attention.triton_merge import merge
from kernels_pallas.decode_attention.triton_read import (
    LEAST,
    Field,
    Groups,
    Reader,
    Slots,
    dtype_of,
    groups_of_all,
    has,
    in_fields,
    in_words,
    num_fields,
    num_groups,
    scaled,
    table_of,
    unit_of,
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

_NOTHING = -1e15  # the maximum of no slot: above what is masked in any unit, so that its weights are 0
_FEWEST_ROWS = 8  # of queries in a product
_MOST_ROWS = 256  # of a head; a prompt's chunks are read by XLA
_MOST_GROUPS = 8  # of channels; each is code of its own
_WARPS = 2112  # sixteen on each of 132 multiprocessors
_FEW_BLOCKS = 8  # which one program goes through sooner than splits are put together
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

    Blocks take less shared memory than any device since compute capability 8.0 gives to a program, 99 KiB.

    Codes in words are worked on by many programs of one warp, which wait for nobody: on an H200 a fifth faster than
    half as many of two. Floats are waited for, whatever the plan.
    """
    parts, groups = (*keys, *values), (groups_of_all(keys), groups_of_all(values))
    fields, dtypes = max(map(num_fields, parts)), [part.planes[0].dtype for part in parts]
    width = power(max(128, *(sum(part.planes[0].shape[3] for part in side) for side in (keys, values)))) // 128
    query_rows, many = max(power(num_rows), _FEWEST_ROWS), max(len(one) for side in groups for one in side) > 1
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
        stages = 1 if jnp.float32 in dtypes and width > 4 else stages  # of a multiprocessor's 99 KiB, they take 36
    blocks = -(-(num_slots or keys[0].num_slots) // (fields * rows))
    programs = num_heads * -(-num_rows // query_rows)
    return Plan(
        fields=fields,
        rows=rows,
        query_rows=query_rows,
        splits=max(min(_WARPS // max(warps, 2) // programs, blocks), 1) if blocks > _FEW_BLOCKS else 1,
        key_groups=groups[0],
        value_groups=groups[1],
        lift=_LIFT if any(dtype_of(part) == jnp.float16 for part in values) else 0,
        num_warps=warps,
        num_stages=stages,
        page=page,
    )


def unsupported(segment: Segment, device: str) -> str | None:
    """Why a segment cannot be served; None if it can.

    Args:
      segment: arrays, or their shapes.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if (reason := not_a_gpu(device)) is not None:
        return reason
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
    """What the kernel reads; heads are B k of them."""

    asked: Asked
    values: Parts  # see `in_fields`
    tables: tuple[Any, ...]  # what codes of each part of the values stand for, or None


def _walk(segment: Segment, query_positions: Int[Array, "B T"], *, scale: float, interpret: Any) -> Running:
    """`walk` on what one device holds."""
    if not segment.values:  # a kernel without them would be another one: keys stand for them, and nobody looks
        segment = dataclasses.replace(segment, values=segment.keys)
    batch, num_tokens, num_heads = segment.queries.shape[:3]
    total, values = batch * segment.keys[0].num_heads, segment.values
    count = batch * num_heads * num_tokens // total
    sizes = {"num_slots": segment.positions.shape[2], "page": segment.page}
    plan = plan_for(segment.keys, values, num_rows=count, num_heads=total, **sizes)
    if segment.owners is not None:
        plan = dataclasses.replace(plan, owner_rows=count // segment.num_kv_heads)
    asked = asked_of(segment, query_positions, fields=plan.fields, heads=total)
    arrays = _Arrays(asked, tuple(in_fields(part, plan.fields) for part in values), tuple(map(table_of, values)))
    found = _call(arrays, scale=scale * math.log2(math.e), plan=plan, interpret=interpret)
    if plan.splits > 1:
        output, largest, sums = merge(*found, interpret=interpret)
    else:
        output, largest, sums = jnp.swapaxes(found[0][:, 0], 1, 2), found[1][:, 0], found[2][:, 0]

    def as_heads(array: jax.Array) -> jax.Array:
        return array[:, :count].reshape(batch, num_heads, num_tokens, *array.shape[2:])

    return as_heads(output), as_heads(largest * math.log(2.0)), as_heads(sums)


def _call(arrays: _Arrays, *, scale: float, plan: Plan, interpret: Any) -> tuple[jax.Array, ...]:
    """Output `heads splits R Q`, maximum and sum of weights `heads splits Q`; Q in whole blocks."""
    heads, num_rows = arrays.asked.queries.shape[:2]
    blocks = -(-num_rows // plan.query_rows)

    def of_split(*sizes: int) -> pl.BlockSpec:
        size, rest = (None, None, *sizes, plan.query_rows), (0,) * len(sizes)
        return pl.BlockSpec(size, lambda block, head, split: (head, split, *rest, block))

    width = sum(piece.size for part in plan.value_groups for group in part for piece in group)
    shape = heads, plan.splits
    sizes = [(*shape, *rest, blocks * plan.query_rows) for rest in ((width,), (), ())]
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, plan=plan, interpret=bool(interpret)),
        grid=(blocks, heads, plan.splits),  # programs that share slots beside each other
        in_specs=[specs_of(arrays, heads, axis=1)],
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
    blocks = live_blocks(arrays.asked, slots)
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
    rows = rows_of(
        arrays.asked,
        pl.program_id(0) * size,
        size=size,
        groups=plan.key_groups,
        scale=scale,
        owner_rows=plan.owner_rows,
    )
    step = functools.partial(_add_block, rows=rows, arrays=arrays, plan=plan, interpret=interpret)
    state = jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, blocks), step, state)
    outputs, offsets = iter(state.outputs), iter(state.offsets)
    for part, group in groups:
        offset = jnp.sum(next(offsets), axis=0)[None, :] if has(part, "offset") else None
        for piece in group:
            found = next(outputs) * (1 / unit_of(part, (group,)))
            output[piece.where, :] = found if offset is None else found + offset
    maximum[...] = state.maximum - plan.lift
    total[...] = jnp.sum(state.total, axis=0)


class _State(NamedTuple):
    """What a program has found; sums over slots are kept field by field, `I Q`."""

    outputs: tuple[jax.Array, ...]  # R Q of each piece
    offsets: tuple[jax.Array, ...]  # I Q of each group: weights times offsets
    maximum: jax.Array  # Q, in units of ln 2, of scaled weights
    total: jax.Array  # I Q: weights


def _add_block(block: jax.Array, state: _State, *, rows: Rows, arrays: _Arrays, plan: Plan, interpret: bool) -> _State:
    """Adds a block of slots: the scores of all fields, their maximum, then field by field what the weights give."""
    asked = arrays.asked
    slots = Slots(block * plan.rows, plan.rows, *asked.positions.shape, asked.pages, plan.page)
    fields = [field_of(index, slots, asked, rows) for index in range(plan.fields)]
    read = functools.partial(Reader, slots=slots, interpret=interpret)
    keys = list(map(read, asked.keys, plan.key_groups, asked.tables))
    values = list(map(read, arrays.values, plan.value_groups, arrays.tables))
    scores = [scores_of(keys, field, rows) for field in fields]
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
            outputs += [next(before) + product(reader.clean(field, piece), shares, (0, 0)) for piece in group]
    return tuple(outputs), tuple(offsets)
