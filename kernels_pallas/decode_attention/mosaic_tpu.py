"""Decode attention over one segment on a TPU: each stored head's keys and values are read once, for all of its queries.

    grid (B k / heads a step, blocks of slots), the running maximum and sum of each row in scratch

    rows   Q = (N / k) T queries of a stored head      scores [Q S] = rows x keys,  output [Q R] = weights x values
    floats bfloat16 or float32 on the matrix unit
    codes  int8, or int4 and int2 in bytes that `bitcast` unpacks for nothing: adjacent tokens, low bits first. Queries
           and weights are two int8 planes each, stacked as more rows: 16 and 14 bits; integer products are exact.

Scales belong to tokens and lie on lanes beside scores and weights, so no key or value is ever scaled. Weights are
floored to 14 bits after a dither was added, one number a slot: a thousand weights of a thousandth of a step each would
otherwise be none at all beside a large one.

Which slots count is said by positions. Blocks behind the last live slot are neither fetched nor computed: their index
map stays at the last live block. What lies in a slot that does not count may be NaN: codes cannot be, scales and scores
are selected, and floats are cleared where a block has such a slot.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention.reference import Running, Segment

_MASKED = -1e30
_ROWS = 8  # sublanes of a float32 tile: rows come in multiples
_LANES = 128
_HIGH = 128  # a weight is high plane * 128 + low plane, both in 0 to 127
_STEPS = 127 * _HIGH  # of a weight of 1
_GOLDEN = 0.6180339887498949

_CODES = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a segment is cut.

    Attributes:
      slots: in a block.
      heads: stored heads of a step.
    """

    slots: int
    heads: int


def blocks_for(bits: int, num_slots: int, num_heads: int) -> Blocks:
    """Blocks that keep the matrix unit busy; small ones are ruled by latency.

    Args:
      bits: of a number.
      num_slots: S.
      num_heads: k.
    """
    slots = {2: 8192, 4: 4096, 8: 2048}.get(bits, 1024)
    heads = 2 if bits == 2 else 1
    import os

    if "BLK" in os.environ:
        slots, heads = map(int, os.environ["BLK"].split(","))
    if num_slots <= slots:  # the whole segment, and as many heads as make up for it
        heads, slots = max(heads * slots // max(num_slots, 1), 1), num_slots
    return Blocks(slots=slots, heads=math.gcd(num_heads, min(1 << (heads.bit_length() - 1), 8)))


def unsupported(segment: Segment) -> str | None:
    """Why a segment cannot be served; None if it can."""
    if segment.owners is not None:
        return "heads share one pool of slots"
    for name, parts in (("keys", segment.keys), ("values", segment.values)):
        if len(parts) != 1 or not isinstance(parts[0], Coded):
            return f"{name} have {len(parts)} parts, or are turned when they are read"
        reason = _unsupported_part(parts[0])
        if reason is not None:
            return f"{name} {reason}"
    if segment.positions.shape[1] not in (1, segment.keys[0].num_heads):
        return "heads that hold tokens of their own share stored keys"
    if (segment.keys[0].bits is None) != (segment.values[0].bits is None):
        return "one of keys and values is in codes and the other in floats"
    return None


def _unsupported_part(part: Coded) -> str | None:
    if part.bits is None:
        plain = part.planes[0].dtype in (jnp.bfloat16, jnp.float32) and part.scale is None and part.offset is None
        return None if plain else "are 8-bit floats, or floats with scales"
    if part.bits not in _CODES or part.levels is not None:
        return f"have {part.bits} bits, or levels of a table"
    if part.offset is not None or part.token_group != 1 or (part.scale is not None and part.scale.ndim != 3):
        return "have offsets, or scales of channels"
    if part.planes[0].shape[2] % 32:
        return f"have {part.num_slots} slots of {part.bits} bits, which do not fill tiles of 32 bytes"
    return None


def walk(segment: Segment, query_positions: Int[Array, "B T"], scale: float, *, interpret: bool = False) -> Running:
    """Attention over one segment; see `reference.decode_attention`.

    Args:
      segment: one that is not `unsupported`.
      query_positions: `B T` int32.
      scale: of the scores.
      interpret: run on any device, step by step.

    Returns:
      Unscaled output, maximum and sum of weights, as the reference's walk gives them.
    """
    batch, num_tokens, num_heads, width = segment.queries.shape
    keys, values = segment.keys[0], segment.values[0]
    stored, num_slots = keys.num_heads, segment.positions.shape[2]
    count = num_heads // stored * num_tokens
    padded = -(-count // _ROWS) * _ROWS

    def as_rows(array: jax.Array, fill: float = 0) -> jax.Array:
        """`B T N ...` -> `B k Q ...`, filled up to whole tiles."""
        rows = jnp.swapaxes(array, 1, 2).reshape(batch, stored, count, *array.shape[3:])
        return jnp.pad(rows, [(0, 0), (0, 0), (0, padded - count)] + [(0, 0)] * (rows.ndim - 3), constant_values=fill)

    queries = as_rows(segment.queries.astype(jnp.float32) * scale)
    positions = as_rows(jnp.broadcast_to(query_positions[:, :, None], (batch, num_tokens, num_heads)), fill=-1)
    bias = None if segment.bias is None else as_rows(segment.bias.astype(jnp.float32) * scale)
    blocks = blocks_for(keys.bits or 8 * keys.planes[0].dtype.itemsize, num_slots, stored)
    live = _live_blocks(query_positions, segment.positions, blocks.slots)
    arrays = queries, positions, bias, keys, values, segment.positions
    output, maximum, total = _call(*arrays, *live, blocks=blocks, interpret=interpret)

    def as_heads(array: jax.Array) -> jax.Array:
        rows = array.reshape(batch, stored, padded, *array.shape[2:])[:, :, :count]
        return rows.reshape(batch, num_heads, num_tokens, *array.shape[2:])

    return as_heads(output), as_heads(maximum[..., 0] * math.log(2.0)), as_heads(total[..., 0])


def _live_blocks(
    query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"], slots: int
) -> tuple[Int[Array, "B"], Int[Array, "B J"]]:
    """How many blocks of each sequence hold a slot that one of its queries sees, and which hold one that none sees."""
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    seen = (positions >= 0) & (positions <= newest)  # B K S
    padding = -positions.shape[2] % slots
    blocks = jnp.pad(seen, [(0, 0), (0, 0), (0, padding)]).reshape(*seen.shape[:2], -1, slots)
    index = jnp.arange(blocks.shape[2], dtype=jnp.int32)
    live = jnp.max(jnp.where(jnp.any(blocks, axis=(1, 3)), index + 1, 0), axis=1)
    return live, jnp.any(~blocks, axis=(1, 3)).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What the kernel's body is written for."""

    rows: int
    blocks: Blocks
    steps_per_row: int  # of the batch
    num_slots: int
    key_bits: int | None
    value_bits: int | None
    key_shift: float
    value_shift: float
    key_scaled: bool
    value_scaled: bool
    biased: bool


def _call(
    queries: Float[Array, "B k Q R"],
    query_positions: Int[Array, "B k Q"],
    bias: Float[Array, "B k Q"] | None,
    keys: Coded,
    values: Coded,
    positions: Int[Array, "B #k S"],
    live: Int[Array, "B"],
    holes: Int[Array, "B J"],
    *,
    blocks: Blocks,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays the arrays out and runs the kernel; `H Q R`, `H Q 128` and `H Q 128`, maxima in units of ln 2."""
    batch, stored, rows, width = queries.shape
    num_slots, total = positions.shape[2], batch * stored
    shape = _Shape(
        rows=rows,
        blocks=blocks,
        steps_per_row=stored // blocks.heads,
        num_slots=num_slots,
        key_bits=keys.bits,
        value_bits=values.bits,
        key_shift=keys.shift,
        value_shift=values.shift,
        key_scaled=keys.scale is not None,
        value_scaled=values.scale is not None,
        biased=bias is not None,
    )
    count, per_row = -(-num_slots // blocks.slots), shape.steps_per_row

    def block_of(step: jax.Array, block: jax.Array, live: jax.Ref) -> jax.Array:
        return jnp.minimum(block, jnp.maximum(live[jax.lax.div(step, per_row)] - 1, 0))

    def of_head(*sizes: int) -> pl.BlockSpec:
        return pl.BlockSpec((blocks.heads, *sizes), lambda step, block, *_: (step, 0, 0))

    def of_slots(array: jax.Array, entries: int) -> pl.BlockSpec:
        size = (blocks.heads, blocks.slots * entries // 8, array.shape[2])
        return pl.BlockSpec(size, lambda step, block, live, _: (step, block_of(step, block, live), 0))

    def on_lanes(heads: int) -> pl.BlockSpec:
        def at(step: jax.Array, block: jax.Array, live: jax.Ref, _: jax.Ref) -> tuple[jax.Array, int, jax.Array]:
            return (step if heads == total else jax.lax.div(step, per_row)), 0, block_of(step, block, live)

        return pl.BlockSpec((blocks.heads if heads == total else 1, 1, blocks.slots), at)

    rows_in, facts = _rows_in(queries * math.log2(math.e), keys, bias)
    inputs = [
        (rows_in.reshape(total, -1, width), of_head(rows_in.shape[2], width)),
        (facts.reshape(total, rows, -1), of_head(rows, facts.shape[3])),
        (query_positions.reshape(total, rows, 1), of_head(rows, 1)),
        (positions.reshape(-1, 1, num_slots), on_lanes(batch * positions.shape[1])),
    ]
    for part in (keys, values):
        plane = part.planes[0].reshape(total, *part.planes[0].shape[2:])
        inputs.append((plane, of_slots(plane, 8 if part.bits is None else part.bits)))
        if part.scale is not None:
            inputs.append((part.scale.reshape(total, 1, num_slots), on_lanes(total)))
    if values.bits is not None:
        dither = (jnp.arange(blocks.slots, dtype=jnp.float32) * _GOLDEN) % 1.0
        inputs.append((dither[None], pl.BlockSpec((1, blocks.slots), lambda step, block, *_: (0, 0))))
    out_width = values.planes[0].shape[3]
    out_specs = [of_head(rows, out_width), of_head(rows, _LANES), of_head(rows, _LANES)]
    return pl.pallas_call(
        functools.partial(_kernel, shape=shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(total // blocks.heads, count),
            in_specs=[spec for _, spec in inputs],
            out_specs=out_specs,
        ),
        out_shape=[jax.ShapeDtypeStruct((total, *spec.block_shape[1:]), jnp.float32) for spec in out_specs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="decode_attention",
    )(live, holes, *[array for array, _ in inputs])


def _rows_in(
    queries: Float[Array, "B k Q R"], keys: Coded, bias: Float[Array, "B k Q"] | None
) -> tuple[jax.Array, Float[Array, "B k Q _"]]:
    """Queries as the matrix unit takes them, and facts of each row: scale, what is added before it, and after it."""
    after = jnp.zeros(queries.shape[:3], jnp.float32) if bias is None else bias * math.log2(math.e)
    if keys.bits is None:
        ones = jnp.ones_like(after)
        return queries.astype(keys.planes[0].dtype), jnp.stack([ones, ones * 0, after], axis=-1)
    scale = jnp.max(jnp.abs(queries), axis=-1) / (127 * 256 + 127)
    whole = jnp.round(queries / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[..., None]).astype(jnp.int32)
    high = (whole + 128) >> 8
    low = whole - (high << 8)
    before = jnp.sum(whole, axis=-1).astype(jnp.float32) * keys.shift
    planes = jnp.concatenate([high, low], axis=2).astype(jnp.int8)
    return planes, jnp.stack([scale, before, after], axis=-1)


def _kernel(live: jax.Ref, holes: jax.Ref, *refs: jax.Ref, shape: _Shape) -> None:
    """One block of slots of some heads."""
    step, block = pl.program_id(0), pl.program_id(1)
    names = ["queries", "facts", "query_positions", "positions", "keys"]
    names += ["key_scale"] * shape.key_scaled + ["values"] + ["value_scale"] * shape.value_scaled
    names += ["dither"] * (shape.value_bits is not None) + ["output", "maximum", "total"]
    ref = dict(zip(names, refs, strict=True))
    output, maximum, total = (ref[name] for name in names[-3:])

    @pl.when(block == 0)
    def _() -> None:
        output[...] = jnp.zeros_like(output)
        maximum[...] = jnp.full_like(maximum, _MASKED / 10)  # above what is masked, so that its weights are 0
        total[...] = jnp.zeros_like(total)

    row = jax.lax.div(step, shape.steps_per_row)

    @pl.when(block < live[row])
    def _() -> None:
        if shape.value_bits is None:

            @pl.when(holes[row, block] != 0)
            def _() -> None:
                _clear(block, ref, shape)

        for head in range(shape.blocks.heads):
            _one_head(head, block, ref, shape)


def _visible(
    head: int, block: jax.Array, ref: dict[str, jax.Ref], shape: _Shape, slots: Any = slice(None)
) -> jax.Array:
    """Which of a block's slots each row of a head sees, `Q S`."""
    positions = ref["positions"][min(head, ref["positions"].shape[0] - 1), :, slots]  # 1 S
    # As unsigned numbers empty slots (-1) are behind every query, and nothing is before padding (-1 + 1).
    ahead = jax.lax.bitcast_convert_type(ref["query_positions"][head] + 1, jnp.uint32)
    visible = jax.lax.bitcast_convert_type(positions, jnp.uint32) < ahead
    if shape.num_slots % shape.blocks.slots:
        start = block * shape.blocks.slots + (0 if isinstance(slots, slice) else slots.start)
        visible &= start + jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1) < shape.num_slots
    return visible


def _clear(block: jax.Array, ref: dict[str, jax.Ref], shape: _Shape) -> None:
    """Sets values that no row sees to 0: a weight of zero does not silence a NaN."""
    values, slots = ref["values"], shape.blocks.slots
    size = _LANES if slots % _LANES == 0 else slots
    for head in range(shape.blocks.heads):

        def piece(index: jax.Array, _: None, head: int = head) -> None:
            start = pl.multiple_of(index * size, size)
            visible = _visible(head, block, ref, shape, pl.ds(start, size))
            seen = jnp.max(visible.astype(jnp.float32), axis=0, keepdims=True)
            column = jnp.transpose(jnp.broadcast_to(seen, (_ROWS, size)))[:, :1]
            rows = values[head, pl.ds(start, size)]
            values[head, pl.ds(start, size)] = jnp.where(column > 0, rows, jnp.zeros_like(rows))

        jax.lax.fori_loop(0, slots // size, piece, None)


def _one_head(head: int, block: jax.Array, ref: dict[str, jax.Ref], shape: _Shape) -> None:
    """Adds a block of slots to a head's rows."""
    visible = _visible(head, block, ref, shape)
    scores = _scores(head, ref, shape)
    scores = jnp.where(visible, scores, _MASKED)
    old = ref["maximum"][head]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    decay = jnp.exp2(old - new)
    weights = jnp.exp2(scores - new[:, :1])
    ref["maximum"][head] = new
    ref["total"][head] = ref["total"][head] * decay + jnp.sum(weights, axis=1, keepdims=True)
    if shape.value_scaled:
        weights = jnp.where(visible, weights * ref["value_scale"][head].astype(jnp.float32), 0.0)
    if shape.value_bits is None:
        added = _products_of_floats(weights, ref["values"][head])
    else:
        added = _products_of_codes(weights, ref["dither"][...], _codes(ref["values"][head], shape.value_bits), shape)
    ref["output"][head] = ref["output"][head] * decay[:, :1] + added


def _codes(data: jax.Array, bits: int) -> jax.Array:
    """Codes of a block, a row a token, as int8."""
    return data if bits == 8 else pltpu.bitcast(data, _CODES[bits]).astype(jnp.int8)


def _scores(head: int, ref: dict[str, jax.Ref], shape: _Shape) -> jax.Array:
    """Scores of a block in units of ln 2, `Q S` float32."""
    queries, facts = ref["queries"][head], ref["facts"][head]
    scale, before, after = (facts[:, index : index + 1] for index in range(3))
    across = (((1,), (1,)), ((), ()))
    if shape.key_bits is None:
        keys = ref["keys"][head]
        exact = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
        scores = jax.lax.dot_general(queries, keys, across, precision=exact, preferred_element_type=jnp.float32)
        return scores + after if shape.biased else scores
    keys = _codes(ref["keys"][head], shape.key_bits)
    planes = jax.lax.dot_general(queries, keys, across, preferred_element_type=jnp.int32)
    scores = (planes[: shape.rows] * 256 + planes[shape.rows :]).astype(jnp.float32)
    scores = scores + before if shape.key_shift else scores
    scores = scores * ref["key_scale"][head].astype(jnp.float32) if shape.key_scaled else scores
    scores = scores * scale
    return scores + after if shape.biased else scores


def _products_of_floats(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weights times values, of which none is NaN behind a weight of 0."""
    exact = jax.lax.Precision.HIGHEST if values.dtype == jnp.float32 else None
    return jnp.dot(weights.astype(values.dtype), values, precision=exact, preferred_element_type=jnp.float32)


def _products_of_codes(weights: jax.Array, dither: jax.Array, codes: jax.Array, shape: _Shape) -> jax.Array:
    """Weights, which are not negative, in two planes times codes."""
    largest = jnp.maximum(jnp.max(weights, axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    whole = (weights * (_STEPS / largest) + dither).astype(jnp.int32)
    planes = jnp.concatenate([whole >> 7, whole & (_HIGH - 1)], axis=0).astype(jnp.int8)
    products = jnp.dot(planes, codes, preferred_element_type=jnp.int32).astype(jnp.float32)
    added = products[: shape.rows] * _HIGH + products[shape.rows :]
    if shape.value_shift:
        added = added + shape.value_shift * jnp.sum(whole, axis=1, keepdims=True).astype(jnp.float32)
    return added * (largest / _STEPS)
