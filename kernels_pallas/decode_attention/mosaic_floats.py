"""Decode attention over bfloat16 and float32 on a TPU: the body of `mosaic_tpu` for keys and values as they are.

    grid (B k / heads a step, blocks of slots), the running maximum and sum of each row in the output's blocks

    rows   Q = (N / k) T queries of a stored head      scores [Q S] = rows x keys,  output [Q V] = weights x values

What lies in a slot that does not count may be NaN: scores are selected, and values are cleared where a block has such a
slot and no row sees it.
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

from kernels_pallas._tpu import LANES, VMEM
from kernels_pallas.decode_attention.mosaic_plan import last_live

MASKED = -1e30
_ROWS = 8  # sublanes of a float32 tile: rows come in multiples
_BLOCK_SLOTS = {4: 512, 2: 1024}


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
    """

    slots: int
    heads: int
    rows: int
    num_slots: int
    scale: float
    biased: bool


def plan_for(
    dtype: Any,
    *,
    rows: int,
    num_slots: int,
    num_heads: int,
    width: int = LANES,
    scale: float = 1.0,
    biased: bool = False,
    shared: bool = True,
) -> Plan:
    """Blocks that keep the matrix unit busy: one head's steps wait for each other, several heads' do not.

    Args:
      dtype: of keys and values.
      rows: Q.
      num_slots: S.
      num_heads: k.
      width: of keys and values, the larger.
      scale: of products.
      biased: whether queries have a bias.
      shared: whether heads hold the same tokens; else a step has all heads, as their positions fill a tile.
    """
    slots, heads = _BLOCK_SLOTS[jnp.dtype(dtype).itemsize], 4
    slots = max(slots * LANES // max(width, LANES) // LANES, 1) * LANES
    if not shared:
        slots = max(slots * heads * _ROWS // (num_heads * rows) // LANES, 1) * LANES
        return Plan(min(slots, num_slots), num_heads, rows, num_slots, scale * math.log2(math.e), biased)
    if num_slots <= slots:  # the whole segment, and as many heads as make up for it
        heads, slots = heads * slots // num_slots, num_slots
    heads = max(min(heads, 8) * _ROWS // rows, 1)
    heads = math.gcd(num_heads, 1 << (heads.bit_length() - 1))
    return Plan(slots, heads, rows, num_slots, scale * math.log2(math.e), biased)


@functools.partial(jax.jit, static_argnames=("plan", "interpret"))
def run(
    plan: Plan,
    queries: Float[Array, "B k Q D"],
    keys: Float[Array, "B k S D"],
    values: Float[Array, "B k S V"],
    *,
    bias: Float[Array, "B k Q"] | None,
    positions: Int[Array, "B #k S"],
    query_positions: Int[Array, "B Q"],
    live: Int[Array, "B"],
    holes: Int[Array, "B blocks"],
    interpret: Any,
) -> tuple[Float[Array, "B k Q V"], Float[Array, "B k Q"], Float[Array, "B k Q"]]:
    """Lays the arrays out and runs the kernel; traced once for all layers that are alike.

    Args:
      plan: see `plan_for`.
      queries: float32.
      keys: as they are stored.
      values: as they are stored.
      bias: of each query's products, times the scale already.
      positions: of the slots.
      query_positions: of the rows, the same for all heads.
      live: blocks of each sequence that hold a slot which a query sees.
      holes: blocks that hold one which none sees.
      interpret: see `pl.pallas_call`.

    Returns:
      Unscaled output, maximum (natural) and sum of weights.
    """
    batch, stored, rows, width = queries.shape
    grid = _Grid(plan, stored // plan.heads)
    inputs = [(queries.astype(keys.dtype), grid.of_heads(rows, width))]
    if plan.biased:
        inputs.append(((bias * math.log2(math.e))[..., None], grid.of_heads(rows, 1)))
    inputs += [
        (query_positions[..., None], grid.of_sequence(rows, 1)),
        (positions, grid.on_lanes(positions.shape[1])),
        (keys, grid.of_slots(keys.shape[3])),
        (values, grid.of_slots(values.shape[3])),
    ]
    out_specs = [grid.of_heads(rows, size) for size in (values.shape[3], LANES, LANES)]
    output, maximum, sums = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, stored // plan.heads, -(-plan.num_slots // plan.slots)),
            in_specs=[spec for _, spec in inputs],
            out_specs=out_specs,
        ),
        out_shape=[jax.ShapeDtypeStruct((batch, stored, *spec.block_shape[2:]), jnp.float32) for spec in out_specs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="decode_attention",
    )(live, holes, *[array for array, _ in inputs])
    return output, maximum[..., 0] * math.log(2.0), sums[..., 0]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Which part of each array a step gets; steps are (sequence, some of its heads, block of slots).

    Arrays stay as they are stored: were they reshaped, XLA would move that into the branch of a round and copy them.
    """

    plan: Plan
    groups: int  # steps of a sequence

    def of_heads(self, *sizes: int) -> pl.BlockSpec:
        """An array `B k ...` that all blocks see."""
        return pl.BlockSpec((1, self.plan.heads, *sizes), lambda row, group, block, *_: (row, group, 0, 0))

    def of_sequence(self, *sizes: int) -> pl.BlockSpec:
        """An array `B ...` that all heads of a sequence see."""
        return pl.BlockSpec((1, *sizes), lambda row, group, block, *_: (row, 0, 0))

    def of_slots(self, width: int) -> pl.BlockSpec:
        """Keys or values `B k S D`."""
        size = (1, self.plan.heads, self.plan.slots, width)
        return pl.BlockSpec(size, lambda row, group, block, live, _: (row, group, last_live(row, block, live), 0))

    def on_lanes(self, heads: int) -> pl.BlockSpec:
        """An array `B K S` or `B 1 S`, of all heads."""
        return pl.BlockSpec(
            (1, heads, self.plan.slots), lambda row, group, block, live, _: (row, 0, last_live(row, block, live))
        )


def _kernel(live: jax.Ref, holes: jax.Ref, *refs: jax.Ref, plan: Plan) -> None:
    """One block of slots of some heads."""
    row, block = pl.program_id(0), pl.program_id(2)
    names = ["queries", *["bias"] * plan.biased, "query_positions", "positions", "keys", "values"]
    ref = dict(zip([*names, "output", "maximum", "total"], refs, strict=True))

    @pl.when(block == 0)
    def _() -> None:
        ref["output"][...] = jnp.zeros_like(ref["output"])
        ref["maximum"][...] = jnp.full_like(ref["maximum"], MASKED / 10)  # above what is masked: its weights are 0
        ref["total"][...] = jnp.zeros_like(ref["total"])

    @pl.when(block < live[row])
    def _() -> None:
        @pl.when(holes[row, block] != 0)
        def _() -> None:
            _clear(block, ref, plan)

        for head in range(plan.heads):
            _one_head(head, block, ref, plan)


def _visible(head: int, block: jax.Array, ref: dict[str, jax.Ref], plan: Plan, slots: Any = slice(None)) -> jax.Array:
    """Which of a block's slots each row of a head sees, `Q S`."""
    own = 0 if ref["positions"].shape[1] == 1 else head
    positions = ref["positions"][0, own : own + 1, slots]  # 1 S
    # As unsigned numbers empty slots (-1) are behind every query, and nothing is before padding (-1 + 1).
    ahead = jax.lax.bitcast_convert_type(ref["query_positions"][0] + 1, jnp.uint32)
    visible = jax.lax.bitcast_convert_type(positions, jnp.uint32) < ahead
    if plan.num_slots % plan.slots:
        start = block * plan.slots + (0 if isinstance(slots, slice) else slots.start)
        visible &= start + jax.lax.broadcasted_iota(jnp.int32, positions.shape, 1) < plan.num_slots
    return visible


def _clear(block: jax.Array, ref: dict[str, jax.Ref], plan: Plan) -> None:
    """Sets values that no row sees to 0: a weight of zero does not silence a NaN."""
    values = ref["values"]
    size = LANES if plan.slots % LANES == 0 else plan.slots
    for head in range(plan.heads):

        def piece(index: jax.Array, _: None, head: int = head) -> None:
            start = pl.multiple_of(index * size, size)
            visible = _visible(head, block, ref, plan, pl.ds(start, size))
            seen = jnp.max(visible.astype(jnp.float32), axis=0, keepdims=True)
            column = jnp.transpose(jnp.broadcast_to(seen, (_ROWS, size)))[:, :1]
            rows = values[0, head, pl.ds(start, size)]
            values[0, head, pl.ds(start, size)] = jnp.where(column > 0, rows, jnp.zeros_like(rows))

        jax.lax.fori_loop(0, plan.slots // size, piece, None)


def _one_head(head: int, block: jax.Array, ref: dict[str, jax.Ref], plan: Plan) -> None:
    """Adds a block of slots to a head's rows."""
    queries, keys, values = ref["queries"][0, head], ref["keys"][0, head], ref["values"][0, head]
    exact = jax.lax.Precision.HIGHEST if keys.dtype == jnp.float32 else None
    across = (((1,), (1,)), ((), ()))
    scores = jax.lax.dot_general(queries, keys, across, precision=exact, preferred_element_type=jnp.float32)
    scores = scores * plan.scale
    if plan.biased:
        scores = scores + ref["bias"][0, head]
    scores = jnp.where(_visible(head, block, ref, plan), scores, MASKED)
    old = ref["maximum"][0, head]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    decay = jnp.exp2(old - new)
    weights = jnp.exp2(scores - new[:, :1])
    ref["maximum"][0, head] = new
    ref["total"][0, head] = ref["total"][0, head] * decay + jnp.sum(weights, axis=1, keepdims=True)
    added = jnp.dot(weights.astype(values.dtype), values, precision=exact, preferred_element_type=jnp.float32)
    ref["output"][0, head] = ref["output"][0, head] * decay[:, :1] + added
