"""Decode attention over one segment on an NVIDIA GPU: each stored head is read once, for all of its queries.

    grid (blocks of query rows, B k, splits of the live slots); the splits' results are merged by XLA in float32

    rows   Q = (N / k) T queries of a stored head      scores [Q S] = rows x keys,  output [Q R] = weights x values
    fields codes of b bits are n = 8/b neighbouring tokens a byte: a tile of bytes is read once, and its field j is a
           tile of the tokens n i + j. Softmax does not mind the order of slots, so fields are never interleaved.
    levels an integer's bits go into the mantissa of 2**b, as it lies in the byte, and 2**b is subtracted: exact, and no
           conversion. It is done in float16, which holds all levels to 2**-12; values with scales are bfloat16, as
           these make weights of any size. Floats stay what they are, and float32 is multiplied in full.

Scales and offsets of tokens go to scores and weights, those of groups of channels to the group's part of them, those of
a channel of a token group alone to the keys and values. Sums over slots are kept slot by slot until the end, so that a
step has one reduction, the maximum. Which slots count is said by positions; blocks behind the last live slot are not
read. What lies in a slot that does not count may be NaN: scores, scales and floats are selected.

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

from kernels_pallas.coded import Coded, look_up, plane_bits
from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Running, Segment, live_slots

_MASKED = -1e30
_NOTHING = _MASKED / 10  # the maximum of no slot: above what is masked, so that its weights are 0
_LEAST = 16  # of each side of a matrix product
_MOST_ROWS = 256  # of a head; a prompt's chunks are read by XLA
_MOST_GROUPS = 8  # of channels; each is code of its own
_PROGRAMS = 528  # four on each of 132 multiprocessors
_WIDEST = 128  # piece of a vector
_LIFT = 14  # float16 weights are up to 2**14, so that small ones are not lost
_MANTISSA = {"float16": (10, 15), "bfloat16": (7, 127)}  # bits, and the exponent's bias

Piece = tuple[int, int]
"""First channel, and how many: a power of two."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a segment is cut.

    Attributes:
      fields: n, tokens of a row: as many as share a byte of the finest plane.
      rows: of a block.
      query_rows: of a program.
      splits: programs that share a head's live slots.
      key_groups: channels of the keys that share scales, each group in pieces.
      value_groups: those of the values.
      lift: the largest weight is 2 to this power.
      num_warps: of a program.
      num_stages: of loads ahead.
    """

    fields: int
    rows: int
    query_rows: int
    splits: int
    key_groups: tuple[tuple[Piece, ...], ...]
    value_groups: tuple[tuple[Piece, ...], ...]
    lift: int
    num_warps: int
    num_stages: int


def plan_for(keys: Coded, values: Coded, *, num_rows: int, num_heads: int) -> Plan:
    """A plan for Q rows of queries and B k heads: it fills the device, and next to no register is spilled on Hopper."""
    fields, groups = max(_fields(keys), _fields(values)), (_groups(keys), _groups(values))
    width = _power(max(128, keys.planes[0].shape[3], values.planes[0].shape[3]))
    full = jnp.float32 in (keys.planes[0].dtype, values.planes[0].dtype)
    single = full or fields == 8 or max(map(len, groups)) > 1  # these hold most registers for themselves
    query_rows = min(max(_power(num_rows), _LEAST), _LEAST if single else max(64 * 128 // width, _LEAST))
    rows, warps = (16, 2 * (width // 128) * (query_rows // _LEAST)) if fields > 1 else (64 * 128 // width, 4)
    rows = 16 if full else 32 if width > 256 or (keys.dtype and values.dtype) else rows
    warps = 8 if full or width > 256 or (single and width > 128) else min(warps, 8)
    stages = 3 if keys.planes[0].dtype == values.planes[0].dtype == jnp.int8 else 2
    blocks = -(-keys.num_slots // (fields * rows))
    programs = num_heads * -(-num_rows // query_rows)
    return Plan(
        fields=fields,
        rows=rows,
        query_rows=query_rows,
        splits=max(min(_PROGRAMS // programs, blocks), 1),
        key_groups=groups[0],
        value_groups=groups[1],
        lift=_LIFT if _value_dtype(values) == jnp.float16 else 0,
        num_warps=warps,
        num_stages=1 if width > 256 and fields > 1 else stages,
    )


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _fields(part: Coded) -> int:
    return 1 if part.bits is None else 8 // min(plane_bits(part.bits))


def _num_groups(part: Coded) -> int:
    """Groups of channels of a token that have scales of their own."""
    grouped = part.token_group == 1 and part.scale is not None and len(part.scale.shape) == 4
    return part.scale.shape[2] if grouped else 1


def _groups(part: Coded) -> tuple[tuple[Piece, ...], ...]:
    count = _num_groups(part)
    size = part.planes[0].shape[3] // count
    return tuple(_pieces(size * index, size) for index in range(count))


def _pieces(start: int, width: int) -> tuple[Piece, ...]:
    """Powers of two that make up a width, the largest first: 80 = 64 + 16."""
    found = []
    while width:
        found.append((start, min(1 << (width.bit_length() - 1), _WIDEST)))
        start, width = start + found[-1][1], width - found[-1][1]
    return tuple(found)


def unsupported(segment: Segment, device: str) -> str | None:
    """Why a segment cannot be served; None if it can.

    Args:
      segment: arrays, or their shapes.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if not device.startswith("NVIDIA"):
        return f"it runs on NVIDIA GPUs, and this is {device}"
    if segment.owners is not None:
        return "heads share one pool of slots"
    for name, parts in (("keys", segment.keys), ("values", segment.values)):
        if len(parts) != 1 or not isinstance(parts[0], Coded):
            return f"{name} have several parts, or are turned when they are read"
        if (reason := _unsupported_part(parts[0])) is not None:
            return f"{name} {reason}"
    keys, values = segment.keys[0], segment.values[0]
    if segment.positions.shape[1] not in (1, keys.num_heads):
        return "heads that hold tokens of their own share stored keys"
    if keys.num_heads != values.num_heads:
        return "keys and values are not of as many heads"
    fields = max(_fields(keys), _fields(values))
    if any(part.token_group % fields for part in (keys, values) if part.token_group > 1):
        return f"groups of tokens divide the {fields} tokens that share a byte"
    rows = segment.queries.shape[1] * segment.queries.shape[2] // keys.num_heads
    return f"{rows} queries share a head, more than {_MOST_ROWS}" if rows > _MOST_ROWS else None


def _unsupported_part(part: Coded) -> str | None:
    plane, count = part.planes[0], _num_groups(part)
    if part.dtype not in ("", "float8_e4m3fn", "float8_e5m2"):
        return f"are of {part.dtype}"
    if part.bits is None and not part.dtype:
        if plane.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"are of {plane.dtype}"
        if part.scale is not None:
            return "are floats with scales"
    if (
        part.bits is not None
        and part.bits < 8
        and part.levels is None
        and not _is_bfloat16(3 * 2 ** (part.bits - 1) - part.shift)
    ):
        return f"have levels shifted by {part.shift}, for which {part.bits} bits leave no room"
    if part.scale is None and (part.offset is not None or part.token_group > 1):
        return "have offsets or groups of tokens without scales"
    if plane.shape[3] // count % _LEAST:
        return f"have {plane.shape[3] // count} numbers that share a scale, no multiple of {_LEAST}"
    if count > _MOST_GROUPS:
        return f"have {count} groups of channels, more than {_MOST_GROUPS}"
    # An offset of so many bytes is taken for a 32-bit integer, which has a sign.
    many = plane.dtype.itemsize == 1 and 2**31 <= math.prod(plane.shape) <= 2**32
    return "take 2 to 4 GiB as bytes" if many else None


def _is_bfloat16(number: float) -> bool:
    """Whether eight binary digits are enough."""
    return (math.frexp(number)[0] * 256).is_integer()


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
      Unscaled output, maximum and sum of weights. The maximum may be less than the largest score by a constant, which
      output and sum make up for.
    """
    function = functools.partial(_walk, scale=scale, interpret=interpret)
    return over_mesh(function, segment, query_positions, mesh)


class _Arrays(NamedTuple):
    """What the kernel reads; heads are B k of them, slots I fields of n."""

    queries: Any  # heads Q R
    bias: Any  # heads Q, or None
    query_positions: Any  # B T; row q is of token q mod T
    keys: Coded  # see `_in_fields`
    values: Coded
    positions: Any  # heads I n, or B I n
    live: Any  # B, blocks to walk
    tables: tuple[Any, Any]  # what the keys' and the values' codes stand for, or None


def _walk(segment: Segment, query_positions: Int[Array, "B T"], *, scale: float, interpret: Any) -> Running:
    """`walk` on what one device holds."""
    queries, keys, values, bias = segment.queries, segment.keys[0], segment.values[0], segment.bias
    positions = segment.positions
    batch, num_tokens, num_heads, stored = *queries.shape[:3], keys.num_heads
    total, count = batch * stored, num_heads // stored * num_tokens
    plan = plan_for(keys, values, num_rows=count, num_heads=total)

    def as_rows(array: jax.Array) -> jax.Array:
        return jnp.swapaxes(array, 1, 2).reshape(total, count, *array.shape[3:])

    arrays = _Arrays(
        as_rows(queries),
        None if bias is None else as_rows(bias),
        query_positions,
        _in_fields(keys, plan.fields),
        _in_fields(values, plan.fields),
        positions.reshape(-1, positions.shape[2] // plan.fields, plan.fields),
        -(-live_slots(query_positions, positions) // (plan.fields * plan.rows)),
        (_table(keys, _key_dtype(keys)), _table(values, _value_dtype(values))),
    )
    output, maximum, sums = _call(arrays, scale=scale * math.log2(math.e), plan=plan, interpret=interpret)
    # JAX's own kernel for decoding holds its maxima back like this: fused with what follows they came out invalid.
    largest = jax.lax.optimization_barrier(jnp.max(maximum, axis=1))  # heads Q
    decay = jnp.exp2(maximum - largest[:, None])  # heads splits Q

    def as_heads(array: jax.Array) -> jax.Array:
        return array[:, :count].reshape(batch, num_heads, num_tokens, *array.shape[2:])

    output, sums = jnp.sum(output * decay[..., None], axis=1), jnp.sum(sums * decay, axis=1)
    return as_heads(output), as_heads(largest * math.log(2.0)), as_heads(sums)


def _key_dtype(keys: Coded) -> Any:
    """The dtype in which keys are multiplied."""
    return jnp.float16 if keys.bits is not None or keys.dtype else keys.planes[0].dtype


def _value_dtype(values: Coded) -> Any:
    """The dtype in which values are multiplied: scales make weights of any size, for which float16 has no room."""
    if values.bits is None and not values.dtype:
        return values.planes[0].dtype
    return jnp.bfloat16 if _has(values, "scale") else jnp.float16


def _call(arrays: _Arrays, *, scale: float, plan: Plan, interpret: Any) -> tuple[jax.Array, ...]:
    """Output `heads splits Q R`, maximum and sum of weights `heads splits Q`; Q in whole blocks."""
    heads, num_rows = arrays.queries.shape[:2]
    stored, blocks = heads // arrays.live.shape[0], -(-num_rows // plan.query_rows)

    def of_head(array: jax.Array) -> pl.BlockSpec:
        """What all programs of a head see of an array `heads ...`, or `B ...` where heads share it."""
        own, rest = array.shape[0] == heads, (0,) * (array.ndim - 1)
        return pl.BlockSpec(
            (None, *array.shape[1:]), lambda block, head, split: (head if own else jax.lax.div(head, stored), *rest)
        )

    def of_split(*sizes: int) -> pl.BlockSpec:
        size, rest = (None, None, plan.query_rows, *sizes), (0,) * len(sizes)
        return pl.BlockSpec(size, lambda block, head, split: (head, split, block, *rest))

    specs = jax.tree.map(of_head, arrays._replace(tables=None))
    whole = jax.tree.map(lambda table: pl.BlockSpec(table.shape, lambda *_: (0,)), arrays.tables)
    shape = (heads, plan.splits, blocks * plan.query_rows)
    width = sum(size for group in plan.value_groups for _, size in group)
    return pl.pallas_call(
        functools.partial(_kernel, scale=scale, plan=plan),
        grid=(blocks, heads, plan.splits),  # programs that share slots beside each other
        in_specs=[specs._replace(tables=whole)],
        out_specs=[of_split(width), of_split(), of_split()],
        out_shape=[jax.ShapeDtypeStruct(size, jnp.float32) for size in ((*shape, width), shape, shape)],
        compiler_params=pltriton.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(arrays)


def _table(part: Coded, dtype: Any) -> Float[Array, "levels"] | None:
    """What the bits of a code stand for, if one read is less than choosing among the levels."""
    if part.levels is None or part.bits < 3:
        return None
    half = len(part.levels) // 2
    return (jnp.asarray(part.levels[half:] + part.levels[:half], jnp.float32) + part.shift).astype(dtype)


def _in_fields(part: Coded, fields: int) -> Coded:
    """With one axis of heads, and fields: planes `heads I _ R`, scales of tokens `heads [C] I n`."""
    widths = (8,) if part.bits is None else plane_bits(part.bits)
    planes = (
        plane.reshape(-1, plane.shape[2] * 8 // (fields * width), fields * width // 8, plane.shape[3])
        for plane, width in zip(part.planes, widths, strict=True)
    )

    def lay_out(array: jax.Array | None) -> jax.Array | None:
        if array is None or part.token_group > 1:
            return None if array is None else array.reshape(-1, *array.shape[2:])
        return array.reshape(-1, *array.shape[2:-1], array.shape[-1] // fields, fields)

    return dataclasses.replace(part, planes=tuple(planes), scale=lay_out(part.scale), offset=lay_out(part.offset))


def _kernel(arrays: _Arrays, output: jax.Ref, maximum: jax.Ref, total: jax.Ref, *, scale: float, plan: Plan) -> None:
    """One split of a head's slots, for some of its rows of queries."""
    split, size, blocks = pl.program_id(2), plan.query_rows, arrays.live[...]
    offsets = plan.value_groups if _has(arrays.values, "offset") else ()
    state = _State(
        tuple(jnp.zeros((size, piece[1]), jnp.float32) for group in plan.value_groups for piece in group),
        tuple(jnp.zeros((size, plan.rows), jnp.float32) for _ in offsets),
        jnp.full((size,), _NOTHING, jnp.float32),
        jnp.zeros((size, plan.rows), jnp.float32),
    )
    each = jax.lax.div(blocks + (plan.splits - 1), plan.splits)
    step = functools.partial(_add_block, rows=_rows_of(arrays, scale=scale, plan=plan), arrays=arrays, plan=plan)
    state = jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, blocks), step, state)
    outputs = iter(state.outputs)
    for index, group in enumerate(plan.value_groups):
        for piece in group:
            found = next(outputs)
            output[:, pl.ds(*piece)] = found + jnp.sum(state.offsets[index], axis=1)[:, None] if offsets else found
    maximum[...] = state.maximum - plan.lift
    total[...] = jnp.sum(state.total, axis=1)


class _Rows(NamedTuple):
    """Rows of queries."""

    pieces: list[list[jax.Array]]  # Q R as they are multiplied, for each group of the keys' channels
    sums: list[jax.Array]  # Q of each group
    factor: jax.Array  # Q, what makes products scores in units of ln 2
    bias: jax.Array | None  # Q, of such scores
    positions: jax.Array  # Q, -1 where there is no query
    newest: jax.Array


def _rows_of(arrays: _Arrays, *, scale: float, plan: Plan) -> _Rows:
    """Reads the queries; those in float16 in units of each row's largest number, which it has room for."""
    (count, _), size, dtype = arrays.queries.shape, plan.query_rows, _key_dtype(arrays.keys)
    start = pl.program_id(0) * size
    index = start + jnp.arange(size, dtype=jnp.int32)
    inside = None if count % size == 0 else index < count
    pieces = [
        [_load(arrays.queries, inside, pl.ds(start, size), pl.ds(*piece)).astype(jnp.float32) for piece in group]
        for group in plan.key_groups
    ]
    factor = jnp.full((size,), scale, jnp.float32)
    if dtype == jnp.float16:
        peaks = [jnp.max(jnp.abs(piece), axis=1) for group in pieces for piece in group]
        unit = jnp.maximum(functools.reduce(jnp.maximum, peaks), jnp.finfo(jnp.float32).tiny)
        pieces = [[piece / unit[:, None] for piece in group] for group in pieces]
        factor = factor * unit
    bias = None
    if arrays.bias is not None:
        bias = _load(arrays.bias, inside, pl.ds(start, size)).astype(jnp.float32) * scale
    positions = arrays.query_positions[jax.lax.rem(index, jnp.full_like(index, arrays.query_positions.shape[0]))]
    positions = positions if inside is None else jnp.where(inside, positions, -1)
    sums = [sum(jnp.sum(piece, axis=1) for piece in group) for group in pieces]
    pieces = [[piece.astype(dtype) for piece in group] for group in pieces]
    return _Rows(pieces, sums, factor, bias, positions, jnp.max(positions))


def _load(ref: jax.Ref, inside: jax.Array | None, *index: Any, fill: int = 0) -> jax.Array:
    """Part of an array; `fill` in the rows, the first of its axes, that are not inside."""
    if inside is None:
        return ref[index]
    index = tuple(jnp.int32(one) if isinstance(one, int) else one for one in index)  # interpreted, it wants arrays
    shape = ref.at[index].shape
    mask = inside if len(shape) == 1 else jnp.broadcast_to(inside[:, None], shape)
    return pltriton.load(ref.at[index], mask=mask, other=jnp.asarray(fill, ref.dtype))


def _has(part: Coded, name: str) -> bool:
    """Whether a part has scales or offsets that belong to tokens."""
    return part.token_group == 1 and getattr(part, name) is not None


class _State(NamedTuple):
    """What a program has found; sums over slots are kept field by field, `Q I`."""

    outputs: tuple[jax.Array, ...]  # Q R of each piece
    offsets: tuple[jax.Array, ...]  # Q I of each group: weights times offsets
    maximum: jax.Array  # Q, in units of ln 2
    total: jax.Array  # Q I: weights


def _add_block(block: jax.Array, state: _State, *, rows: _Rows, arrays: _Arrays, plan: Plan) -> _State:
    """Adds a block of slots: the scores of all fields, their maximum, then field by field what the weights give."""
    slots = _Slots(block * plan.rows, plan.rows, *arrays.positions.shape)
    fields = [slots.field(arrays.positions, index, rows) for index in range(plan.fields)]
    keys = _Reader(arrays.keys, slots, _key_dtype(arrays.keys), arrays.tables[0])
    values = _Reader(arrays.values, slots, _value_dtype(arrays.values), arrays.tables[1])
    scores = [_scores(keys, field, rows, plan.key_groups) for field in fields]
    new = jnp.maximum(state.maximum, jnp.max(functools.reduce(jnp.maximum, scores), axis=1))
    decay = jnp.exp2(state.maximum - new)[:, None]
    state = jax.tree.map(lambda found: found * decay, state._replace(maximum=None))
    for field, score in zip(fields, scores, strict=True):
        weights = jnp.exp2(score - (new - plan.lift)[:, None])
        if not _has(arrays.values, "scale"):  # what is added up is what is multiplied
            weights = weights.astype(values.dtype).astype(jnp.float32)
        outputs, offsets = _add_field(values, field, weights, state, plan.value_groups)
        state = _State(outputs, offsets, None, state.total + weights)
    return state._replace(maximum=new)


class _Field(NamedTuple):
    """A token of each row of a block: its index, which query rows see it (`Q I`), and whether any does (`I`)."""

    index: int
    visible: jax.Array
    seen: jax.Array


class _Slots:
    """The slots of a block, in rows of `fields` tokens."""

    def __init__(self, start: jax.Array, size: int, count: int, fields: int):
        index = start + jnp.arange(size, dtype=jnp.int32)
        self.index, self.fields, self._where = jnp.minimum(index, count - 1), fields, pl.ds(start, size)
        self._inside = index < count if count % size else None

    def load(self, ref: jax.Ref, *index: Any, before: tuple[int, ...] = (), fill: int = 0) -> jax.Array:
        """Entries of the rows, `I ...`; `fill` behind the last one."""
        return _load(ref, self._inside, *before, self._where, *index, fill=fill)

    def field(self, positions: jax.Ref, index: int, rows: _Rows) -> _Field:
        """Who sees the tokens of a field."""
        found = self.load(positions, index, fill=-1)
        present = found >= 0
        visible = present[None, :] & (found[None, :] <= rows.positions[:, None])
        return _Field(index, visible, present & (found <= rows.newest))


class _Reader:
    """A block of one part; bytes that fields share are read once."""

    def __init__(self, part: Coded, slots: _Slots, dtype: Any, table: jax.Ref | None):
        self.part, self.dtype, self._slots, self._table = part, dtype, slots, table
        self._held: dict[Any, jax.Array] = {}

    def of_tokens(self, name: str, field: _Field, group: int) -> Float[Array, "slots"] | None:
        """A field's scales or offsets of a group of channels; None if there are none, or they are in the numbers."""
        if not _has(self.part, name):
            return None
        ref = getattr(self.part, name)
        found = self._slots.load(ref, field.index, before=(group,) if len(ref.shape) == 3 else ())
        return jnp.where(field.seen, found.astype(jnp.float32), 0.0)

    def numbers(self, field: _Field, piece: Piece) -> jax.Array:
        """A field's numbers before scales and offsets of tokens, `I R`."""
        part = self.part
        found = self._bytes(0, field.index, piece) if part.bits is None else self._levels(field, piece)
        if part.dtype:
            found = _from_float8(found, part.dtype, self.dtype)
        if part.token_group > 1:
            exact = self.dtype if part.scale.dtype == self.dtype else jnp.float32
            found = found.astype(exact) * self._of_channels("scale", piece).astype(exact)
            if part.offset is not None:
                found = found + self._of_channels("offset", piece).astype(exact)
            found = found.astype(self.dtype)
        if part.bits is None or part.token_group > 1:  # no others can be NaN
            found = jnp.where(field.seen[:, None], found, jnp.zeros_like(found))
        return found

    def _bytes(self, plane: int, entry: int, piece: Piece) -> jax.Array:
        key = plane, entry, piece
        if key not in self._held:
            self._held[key] = self._slots.load(self.part.planes[plane], entry, pl.ds(*piece))
        return self._held[key]

    def _bits(self, field: _Field, piece: Piece, up: int) -> jax.Array:
        """A field's codes from all planes, the lowest bit at bit `up`, as int32."""
        whole = None
        for plane, width in enumerate(plane_bits(self.part.bits)):
            entry, bit = divmod(field.index * width, 8)
            bytes_ = self._bytes(plane, entry, piece).astype(jnp.int32)
            moved = bytes_ >> (bit - up) if bit > up else bytes_ << (up - bit)
            moved = moved & (((1 << width) - 1) << up)
            whole = moved if whole is None else whole | moved
            up += width
        return whole

    def _levels(self, field: _Field, piece: Piece) -> jax.Array:
        """What a field's codes stand for."""
        part, half = self.part, 1 << (self.part.bits - 1)
        if self._table is not None:
            return self._table[self._bits(field, piece, 0)]
        mantissa, bias = _MANTISSA[jnp.dtype(self.dtype).name]
        if part.levels is not None or part.bits > mantissa:
            codes = (self._bits(field, piece, 0) ^ half) - half
            found = codes.astype(jnp.float32) if part.levels is None else look_up(codes, part.levels)
            return (found + part.shift if part.shift else found).astype(self.dtype)
        # 2**b with the code's bits below: what it stands for is 2**b + 2**(b-1) less.
        up = mantissa - part.bits
        word = self._bits(field, piece, up) ^ (((bias + part.bits) << mantissa) | (half << up))
        number = jax.lax.bitcast_convert_type(word.astype(jnp.int16), self.dtype)
        return number - jnp.asarray(3 * half - part.shift, self.dtype)

    def _of_channels(self, name: str, piece: Piece) -> jax.Array:
        """Each row's scales or offsets, which its fields share, `I R`."""
        ref, key = getattr(self.part, name), (name, piece)
        if key not in self._held:
            rows = self.part.token_group // self._slots.fields
            group = jax.lax.div(self._slots.index, jnp.full_like(self._slots.index, rows))
            self._held[key] = ref[group, pl.ds(*piece)]
        return self._held[key]


def _from_float8(bytes_: jax.Array, name: str, dtype: Any) -> jax.Array:
    """Eight-bit floats by their bits, which every generation can: no value is lost in float16."""
    wide = bytes_.astype(jnp.int16)
    if name == "float8_e5m2":
        found = jax.lax.bitcast_convert_type(wide << 8, jnp.float16)
    else:  # the sign is copied past the exponent, which is 8 less in float16; what was NaN is 480
        found = jax.lax.bitcast_convert_type((wide << 7) & jnp.int16(~0x4000), jnp.float16) * jnp.float16(256)
    return found.astype(dtype)


def _scores(
    keys: _Reader, field: _Field, rows: _Rows, groups: tuple[tuple[Piece, ...], ...]
) -> Float[Array, "Q slots"]:
    """Scores of a field in units of ln 2."""
    scores = jnp.zeros(field.visible.shape, jnp.float32)
    for index, group in enumerate(groups):
        pairs = zip(rows.pieces[index], group, strict=True)
        products = sum(_product(row, keys.numbers(field, piece), 1) for row, piece in pairs)
        if (scale := keys.of_tokens("scale", field, index)) is not None:
            products = products * scale[None, :]
        if (offset := keys.of_tokens("offset", field, index)) is not None:
            products = products + offset[None, :] * rows.sums[index][:, None]
        scores = scores + products
    scores = scores * rows.factor[:, None]
    if rows.bias is not None:
        scores = scores + rows.bias[:, None]
    return jnp.where(field.visible, scores, _MASKED)


def _product(left: jax.Array, right: jax.Array, axis: int) -> jax.Array:
    """Matrix product in float32 over an axis of the right side; float32 in full, not rounded to 10 bits."""
    exact = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left, right, (((1,), (axis,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _add_field(
    values: _Reader,
    field: _Field,
    weights: Float[Array, "Q slots"],
    state: _State,
    groups: tuple[tuple[Piece, ...], ...],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Outputs and what offsets come to, with what a field's weights give."""
    before, outputs, offsets = iter(state.outputs), [], []
    for index, group in enumerate(groups):
        if (offset := values.of_tokens("offset", field, index)) is not None:
            offsets.append(state.offsets[index] + weights * offset[None, :])
        scale = values.of_tokens("scale", field, index)
        scaled = (weights if scale is None else weights * scale[None, :]).astype(values.dtype)
        outputs += [next(before) + _product(scaled, values.numbers(field, piece), 0) for piece in group]
    return tuple(outputs), tuple(offsets)
