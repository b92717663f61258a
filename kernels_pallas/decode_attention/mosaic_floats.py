"""Decode attention on a TPU's float matrix unit: the body of `mosaic_tpu` for all that `mosaic_codes` does not take.

    grid (B, k / heads a step, blocks of slots), the running maximum and sum of each row in the output's blocks

    rows   Q = (N / k) T queries of a stored head      scores [Q S] = rows x keys,  output [Q V] = weights x values

Keys and values are parts: floats, which go to the matrix unit as they are, or codes, which `mosaic_parts` makes floats
of in fast memory. What lies in a slot that does not count may be NaN: scores are selected, scales are cleaned, and
values that are floats are cleared where a block has such a slot and no row sees it.
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

from kernels_pallas._tpu import LANES, ROWS, VMEM
from kernels_pallas.coded import Coded, Parts
from kernels_pallas.decode_attention import mosaic_floats_body, mosaic_pages, mosaic_parts
from kernels_pallas.decode_attention.mosaic_parts import CHUNK, Layout
from kernels_pallas.decode_attention.mosaic_plan import last_live

_BLOCK_SLOTS = {4: 1024, 2: 4096}  # of two heads with one query each
_MOST_RATIO = 4  # by which many rows make blocks shorter
_CODED_SLOTS = 2048
_MOST_AHEAD = 8  # heads of codes that are written out; more make long programs
_MOST_BYTES = VMEM // 6  # of a block; there are two at a time, and what is made of them


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel's body is written for.

    Attributes:
      slots: S of a block.
      heads: stored heads of a step.
      rows: Q, a multiple of 8.
      num_slots: of the segment.
      scale: of products, in units of ln 2.
      biased: whether rows have a bias.
      keys: parts of the keys.
      values: parts of the values.
      pooled: whether heads share one pool of slots.
      unit: slots that are copied together where pages are read, see `mosaic_pages`; 0 where blocks are.
      one_core: whether all steps follow each other on one core.
      ahead: whether the scores of all heads that are written out side by side come before their weights: the matrix
        unit takes things in order, and would wait for what becomes of the scores that it made last.
    """

    slots: int
    heads: int
    rows: int
    num_slots: int
    scale: float
    biased: bool
    keys: tuple[Layout, ...]
    values: tuple[Layout, ...]
    pooled: bool
    unit: int = 0
    one_core: bool = True
    ahead: bool = True

    @property
    def parts(self) -> dict[str, Layout]:
        """By name."""
        sides = {"key": self.keys, "value": self.values}
        return {f"{side}{index}": one for side, layouts in sides.items() for index, one in enumerate(layouts)}

    @property
    def num_blocks(self) -> int:
        """Of a sequence."""
        return -(-self.num_slots // self.slots)

    @property
    def multiple(self) -> int:
        """Slots that blocks are multiples of."""
        layouts = self.parts.values()
        return LANES if all(one.plain for one in layouts) else math.lcm(*(one.multiple for one in layouts))

    @property
    def cleared(self) -> tuple[int, ...]:
        """Parts of the values that are floats, whose empty slots may hold NaN."""
        return tuple(index for index, layout in enumerate(self.values) if layout.bits is None)

    def scales_tokens(self, name: str) -> bool:
        """Whether an array is scales or offsets, one a token."""
        part, _, field = name.partition(".")
        return field in ("scale", "offset") and self.parts[part].groups == 1

    @property
    def chunk(self) -> int:
        """Slots that go through the matrix unit together; floats need no registers of their own."""
        return self.slots if all(one.plain for one in self.parts.values()) else CHUNK

    @property
    def together(self) -> int:
        """Heads that are written out side by side, so that one goes on where another waits."""
        if all(one.bits is None for one in self.parts.values()):
            return self.heads
        most = _MOST_AHEAD if self.ahead and self.values else 2
        return self.heads if self.heads <= most else math.gcd(self.heads, most)


def plan_for(
    keys: Parts,
    values: Parts,
    *,
    rows: int,
    num_slots: int,
    scale: float = 1.0,
    biased: bool = False,
    shared: bool = True,
    pooled: bool = False,
    short: bool = True,
    native: tuple[str, ...] = (),
    ahead: bool = True,
) -> Plan:
    """Blocks that keep the matrix unit busy: one head's steps wait for each other, several heads' do not.

    Args:
      keys: arrays, or their shapes.
      values: the same.
      rows: Q.
      num_slots: S.
      scale: of products.
      biased: whether queries have a bias.
      shared: whether heads hold the same tokens; else a step has all heads, as their positions fill a tile.
      pooled: whether heads share one pool of slots.
      short: see `Layout`.
      native: see `Layout.of`.
      ahead: see `Plan`; only where something is coded.
    """
    layouts = tuple(tuple(Layout.of(part, short=short, native=native) for part in parts) for parts in (keys, values))
    make = functools.partial(
        Plan,
        rows=rows,
        num_slots=num_slots,
        scale=scale * math.log2(math.e),
        biased=biased,
        keys=layouts[0],
        values=layouts[1],
        pooled=pooled,
    )
    num_heads, width = keys[0].num_heads, max(sum(one.size for one in side) for side in layouts)
    if all(one.plain for side in layouts for one in side):
        itemsize = max(jnp.dtype(one.dtype).itemsize for side in layouts for one in side)
        # They wait for memory, whatever the order, and need no spills in this one.
        return make(*_float_blocks(_BLOCK_SLOTS[itemsize], rows, num_slots, num_heads, width, shared), ahead=False)
    multiple = math.lcm(*(one.multiple for side in layouts for one in side))
    heads = num_heads if num_heads <= 8 or not shared else math.gcd(num_heads, 8)
    slots = _CODED_SLOTS * LANES // max(width, LANES) * min(8 // min(heads, 8), 2)
    slots = min(slots, _CODED_SLOTS * 256 // (heads * rows), -(-num_slots // multiple) * multiple)
    slots = min(slots, int(_MOST_BYTES / (heads * sum(one.slot_bytes for side in layouts for one in side))))
    return make(max(slots // multiple, 1) * multiple, heads, ahead=ahead)


def _float_blocks(slots: int, rows: int, num_slots: int, num_heads: int, width: int, shared: bool) -> tuple[int, int]:
    """Slots and heads of a step where nothing is coded."""
    heads = 2
    slots = max(slots * min(2 * ROWS, rows) // rows, slots // _MOST_RATIO)
    slots = max(slots * LANES // max(width, LANES) // LANES, 1) * LANES
    if not shared:
        slots = max(slots * heads * min(2 * ROWS, rows) // (num_heads * rows) // LANES, 1) * LANES
        return min(slots, num_slots), num_heads
    if num_slots <= slots:  # the whole segment, and as many heads as make up for it
        heads, slots = heads * slots // num_slots, num_slots
    heads = max(min(heads, 8) * ROWS // rows, 1)
    return slots, math.gcd(num_heads, 1 << (heads.bit_length() - 1))


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def run(
    plan: Plan,
    queries: Float[Array, "B k Q _"],
    keys: Parts,
    values: Parts,
    *,
    live: Int[Array, "B"],
    holes: Int[Array, "B blocks"],
    pages: Int[Array, "_"] | None,
    interpret: Any,
    **given: Any,
) -> tuple[Float[Array, "B k Q _"], Float[Array, "B k Q"], Float[Array, "B k Q"]]:
    """Lays the arrays out and runs the kernel; traced once for all layers that are alike.

    Args:
      plan: see `plan_for`.
      queries: float32, the numbers of the keys' parts beside each other.
      keys: as they are stored.
      values: as they are stored.
      live: blocks of each sequence that hold a slot which a query sees.
      holes: blocks that hold one which none sees.
      pages: see `mosaic_pages.units_of`; None where whole blocks are read.
      interpret: see `pl.pallas_call`.
      given: the other arguments of `inputs_of`.

    Returns:
      Unscaled output, maximum (natural) and sum of weights.
    """
    batch, stored, rows = queries.shape[:3]
    grid = Grid(plan, stored // plan.heads)
    inputs = inputs_of(plan, queries, keys + values, **given)
    outs = {name: grid.of_heads(rows, layout.size) for name, layout in plan.parts.items() if name.startswith("value")}
    outs |= {"maximum": grid.of_heads(rows, LANES), "total": grid.of_heads(rows, LANES)}
    scratch = scratch_of(plan, inputs)
    listed = {} if pages is None else {"pages": pages}
    found = pl.pallas_call(
        functools.partial(mosaic_floats_body.kernel, plan=plan, names=(*listed, *inputs, *outs, *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2 + len(listed),
            grid=(batch, grid.groups, plan.num_blocks),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=list(outs.values()),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, stored, *spec.block_shape[2:]), jnp.float32) for spec in outs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=_order(plan),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=plan.unit > 0,  # of each page they take longer than its copy
        ),
        interpret=interpret,
        name="decode_attention",
    )(live, holes, *listed.values(), *[array for array, _ in inputs.values()])
    *outputs, maximum, sums = found
    output = jnp.concatenate(outputs, axis=3) if outputs else jnp.zeros((batch, stored, rows, 0), jnp.float32)
    return output, maximum[..., 0] * math.log(2.0), sums[..., 0]


def _order(plan: Plan) -> tuple[str, str, str]:
    """Which steps may run on two cores: where pages are read, a step begins what the next one needs."""
    if plan.unit:
        return ("arbitrary" if plan.one_core else "parallel", "arbitrary", "arbitrary")
    return ("parallel", "parallel", "arbitrary")


def inputs_of(
    plan: Plan,
    queries: Float[Array, "B k Q _"],
    parts: Parts,
    *,
    bias: Float[Array, "B k Q"] | None,
    positions: Int[Array, "B #k S"],
    query_positions: Int[Array, "B Q"],
    owners: Int[Array, "B 1 S"] | None,
    row_heads: Int[Array, "Q"] | None,
) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """Arrays by name, and which part of each a step gets.

    Args:
      plan: see `plan_for`.
      queries: float32.
      parts: those of keys and then those of values.
      bias: of each query's products, times the scale already.
      positions: of the slots.
      query_positions: of the rows, the same for all heads.
      owners: of a pool's slots.
      row_heads: key/value head of each row of a pool.
    """
    rows = queries.shape[2]
    grid = Grid(plan, queries.shape[1] // plan.heads)
    inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {}
    first = 0
    for index, layout in enumerate(plan.keys):
        inputs |= _queries_of(layout, queries[..., first : first + layout.size], f"key{index}", grid)
        first += layout.size
    if plan.biased:
        inputs["bias"] = (bias * math.log2(math.e))[..., None], grid.of_heads(rows, 1)
    inputs["query_positions"] = query_positions[..., None], grid.of_sequence(rows, 1)
    inputs["positions"] = positions, grid.on_lanes(positions.shape[1])
    if plan.pooled:
        inputs["owners"] = owners, grid.on_lanes(1)
        inputs["row_heads"] = row_heads[None, :, None], pl.BlockSpec((1, rows, 1), lambda *_: (0, 0, 0))
    for (name, layout), part in zip(plan.parts.items(), parts, strict=True):
        inputs |= _arrays_of(layout, part, name, grid)
    return inputs


def scratch_of(plan: Plan, inputs: dict[str, Any]) -> dict[str, Any]:
    """Memory of a step: scales and offsets of tokens, as they are read, and pages."""
    names = [name for name in inputs if plan.scales_tokens(name)]
    found = {f"{name}.clean": pltpu.VMEM((plan.heads, plan.slots), jnp.float32) for name in names}
    return found | (mosaic_pages.buffers(plan, inputs) if plan.unit else {})


def _queries_of(
    layout: Layout, queries: Float[Array, "B k Q R"], name: str, grid: "Grid"
) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """Rows as a part of the keys wants them, and their sums in each group of channels."""
    if layout.plain:
        return {f"{name}.rows": (queries.astype(layout.dtype), grid.of_heads(*queries.shape[2:]))}
    groups = layout.copies // 2
    channel = jnp.arange(layout.size, dtype=jnp.int32)[None] * groups // layout.size
    own = (channel == jnp.arange(groups, dtype=jnp.int32)[:, None])[None, None, :, None]  # 1 1 C 1 R
    parted = jnp.where(own, queries[:, :, None], 0.0)  # B k C Q R
    rows = jnp.concatenate(mosaic_parts.split(parted * layout.unit), axis=3)  # two times Q
    rows = rows.reshape(*queries.shape[:2], -1, layout.size)
    found = {f"{name}.rows": (rows, grid.of_heads(*rows.shape[2:]))}
    if mosaic_parts.adds(layout):
        sums = jnp.sum(parted, axis=-1, keepdims=True)
        found[f"{name}.sums"] = sums, grid.of_heads(*sums.shape[2:])
    return found


def _arrays_of(layout: Layout, part: Coded, name: str, grid: "Grid") -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """The arrays of a part, float16 as its bits."""
    if layout.turned:
        # A view, as the array lies so already; but XLA moves it into the branches of a round, and copies there. A
        # barrier before it is worse: it wants the array in the order of its axes.
        return {f"{name}.plane0": (jnp.swapaxes(part.planes[0], 2, 3), grid.of_channels(layout.size))}
    found = {
        f"{name}.plane{index}": (plane, grid.of_slots(width, plane.shape[3]))
        for index, (plane, width) in enumerate(zip(part.planes, layout.widths, strict=True))
    }
    if layout.levels is not None:
        found[f"{name}.table"] = mosaic_parts.table_of(layout), pl.BlockSpec((16, LANES), lambda *_: (0, 0))
    for field in ("scale", "offset"):
        array = getattr(part, field)
        if array is None:
            continue
        bits = jax.lax.bitcast_convert_type(array, jnp.int16)
        if layout.token_group > 1:
            found[f"{name}.{field}"] = bits, grid.of_token_groups(layout.token_group, layout.size)
        elif layout.groups == 1:
            flat = bits.reshape(-1, grid.plan.heads, grid.plan.num_slots)
            found[f"{name}.{field}"] = flat, grid.of_tokens()
        else:
            found[f"{name}.{field}"] = bits, grid.of_channels(layout.groups)
    return found


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which part of each array a step gets; steps are (sequence, some of its heads, block of slots).

    Codes and wide floats stay as they are stored: were they reshaped, XLA would move that into the branch of a round
    and copy them.
    """

    plan: Plan
    groups: int  # steps of a sequence

    def of_heads(self, *sizes: int) -> pl.BlockSpec:
        """An array `B k ...` that all blocks see."""
        zeros = (0,) * len(sizes)
        return pl.BlockSpec((1, self.plan.heads, *sizes), lambda row, group, block, *_: (row, group, *zeros))

    def of_sequence(self, *sizes: int) -> pl.BlockSpec:
        """An array `B ...` that all heads of a sequence see."""
        return pl.BlockSpec((1, *sizes), lambda row, group, block, *_: (row, 0, 0))

    def of_slots(self, width: int, size: int) -> pl.BlockSpec:
        """Floats, or a plane of codes, `B k bytes R`; pages are cut out by the kernel."""
        if self.plan.unit:
            return pl.BlockSpec(memory_space=pltpu.HBM)
        shape = (1, self.plan.heads, self.plan.slots * width // 8, size)
        return pl.BlockSpec(shape, lambda row, group, block, live, *_: (row, group, last_live(row, block, live), 0))

    def of_token_groups(self, token_group: int, size: int) -> pl.BlockSpec:
        """An array `B k S/t R`."""
        shape = (1, self.plan.heads, self.plan.slots // token_group, size)
        return pl.BlockSpec(shape, lambda row, group, block, live, *_: (row, group, last_live(row, block, live), 0))

    def of_channels(self, count: int) -> pl.BlockSpec:
        """An array `B k C S`."""
        shape = (1, self.plan.heads, count, self.plan.slots)
        return pl.BlockSpec(shape, lambda row, group, block, live, *_: (row, group, 0, last_live(row, block, live)))

    def of_tokens(self) -> pl.BlockSpec:
        """An array `B k S`, as (steps of all sequences, heads a step, S)."""
        return pl.BlockSpec(
            (1, self.plan.heads, self.plan.slots),
            lambda row, group, block, live, *_: (row * self.groups + group, 0, last_live(row, block, live)),
        )

    def out_of_tokens(self) -> pl.BlockSpec:
        """The same, to be written: blocks that are not alive as well."""
        return pl.BlockSpec(
            (1, self.plan.heads, self.plan.slots), lambda row, group, block, *_: (row * self.groups + group, 0, block)
        )

    def on_lanes(self, heads: int) -> pl.BlockSpec:
        """An array `B K S` or `B 1 S`, of all heads."""
        return pl.BlockSpec(
            (1, heads, self.plan.slots), lambda row, group, block, live, *_: (row, 0, last_live(row, block, live))
        )
