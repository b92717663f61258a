"""Attention mass on an NVIDIA GPU: what the weights of each slot come to, by a second walk that reads keys alone.

    share[s, q] = 2^(score[s, q] - level[q])        level: log2 of what the weights of all segments come to
    mass[s]     = sum, largest, or number under 1 / seen of the shares, over the Q = G T rows of a key/value head

    grid (B K, splits of the live blocks): a program owns blocks of slots, and goes through all rows of queries for
    each, so that no two write one slot. What lies behind the last live slot is shared out too, and is 0.

Heads that share stored keys are programs beside each other: the chip's cache reads the keys once.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Segment, Totals
from kernels_pallas.decode_attention.triton_gpu import Plan, plan_for
from kernels_pallas.decode_attention.triton_read import Reader, Slots
from kernels_pallas.decode_attention.triton_scores import (
    Asked,
    Rows,
    as_rows,
    asked_of,
    field_of,
    live_blocks,
    rows_of,
    scores_of,
    specs_of,
)


def unsupported(segment: Segment) -> str | None:
    """Why the masses of a segment that is not `triton_gpu.unsupported` cannot be given; None if they can."""
    return None if segment.pages is None else "pages are read"


def mass(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    scale: float,
    totals: Totals,
    kind: str,
    *,
    mesh: Mesh | None = None,
    interpret: Any = False,
) -> Float[Array, "B #K S"]:
    """What the weights of each slot come to: see `reference.decode_attention`, and `triton_gpu.walk` for the arguments.

    Args:
      segment: one that is neither `triton_gpu.unsupported` nor `unsupported`.
      query_positions: `B T` int32.
      scale: of the scores.
      totals: of all segments.
      kind: one of `reference.MASSES`.
      mesh: as for `walk`.
      interpret: as for `walk`.
    """
    function = functools.partial(_mass, scale=scale, kind=kind, interpret=interpret)
    level = totals.level * math.log2(math.e)
    return over_mesh(function, segment, query_positions, mesh, level, totals.uniform)


class _Arrays(NamedTuple):
    """What the kernel reads; heads are B K of them, or B where they share a pool."""

    asked: Asked
    level: Any  # heads Q
    uniform: Any  # heads Q: 1 / slots that a row sees; None unless it is asked for


def _mass(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    level: Float[Array, "B N T"],
    uniform: Float[Array, "B N T"],
    *,
    scale: float,
    kind: str,
    interpret: Any,
) -> Float[Array, "B #K S"]:
    """What one device does."""
    batch, num_tokens, num_heads = segment.queries.shape[:3]
    own = 1 if segment.owners is not None else segment.num_kv_heads
    heads, group = batch * own, num_heads // segment.num_kv_heads
    plan = _plan_for(segment, num_rows=num_heads // own * num_tokens, num_heads=heads)
    arrays = _Arrays(
        asked_of(segment, query_positions, fields=plan.fields, heads=heads),
        as_rows(level, heads),
        as_rows(uniform, heads) if kind == "low" else None,
    )
    rows = functools.partial(
        rows_of,
        size=plan.query_rows,
        groups=plan.key_groups,
        scale=scale * math.log2(math.e),
        owner_rows=0 if segment.owners is None else group * num_tokens,
    )
    found = pl.pallas_call(
        functools.partial(_kernel, rows=rows, plan=plan, kind=kind, group=group, interpret=bool(interpret)),
        grid=(heads, plan.splits),
        in_specs=[specs_of(arrays, heads, axis=0)],
        out_specs=pl.BlockSpec((None, *arrays.asked.positions.shape[1:]), lambda head, split: (head, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((heads, *arrays.asked.positions.shape[1:]), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=plan.num_warps, num_stages=plan.num_stages),
        interpret=interpret,
        name="attention_mass",
    )(arrays)
    return found.reshape(batch, own, -1)


def _plan_for(segment: Segment, *, num_rows: int, num_heads: int) -> Plan:
    """A plan without values, its splits as if there were no more rows of queries than one product takes."""
    at_once = plan_for(segment.keys, (), num_rows=num_rows, num_heads=num_heads).query_rows
    return plan_for(segment.keys, (), num_rows=min(num_rows, at_once), num_heads=num_heads)


def _kernel(arrays: _Arrays, found: jax.Ref, *, rows: Any, plan: Plan, kind: str, group: int, interpret: bool) -> None:
    """Some blocks of a head's slots."""
    split, size = pl.program_id(1), plan.fields * plan.rows
    count, num_rows = arrays.asked.positions.shape[0], arrays.asked.queries.shape[0]
    live = live_blocks(arrays.asked, size)
    each = jax.lax.div(live + (plan.splits - 1), plan.splits)
    once = rows(arrays.asked, 0) if num_rows <= plan.query_rows else None
    weigh = functools.partial(_masses, arrays=arrays, plan=plan, kind=kind, interpret=interpret)

    def live_block(block: jax.Array, _: None) -> None:
        slots = Slots(block * plan.rows, plan.rows, *arrays.asked.positions.shape)
        if once is not None:
            masses = weigh(once, slots=slots)
        else:

            def add(index: jax.Array, masses: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                new = weigh(rows(arrays.asked, index * plan.query_rows), slots=slots)
                return tuple(map(jnp.maximum if kind == "peak" else jnp.add, masses, new))

            zeros = (jnp.zeros((plan.rows,), jnp.float32),) * plan.fields
            masses = jax.lax.fori_loop(0, -(-num_rows // plan.query_rows), add, zeros)
        for field, one in enumerate(masses):
            slots.store(found, one if kind == "peak" else one * (1 / group), field)

    def dead_block(index: jax.Array, _: None) -> None:
        slots = Slots((live + split + index * plan.splits) * plan.rows, plan.rows, *arrays.asked.positions.shape)
        for field in range(plan.fields):
            slots.store(found, jnp.zeros((plan.rows,), jnp.float32), field)

    jax.lax.fori_loop(split * each, jnp.minimum((split + 1) * each, live), live_block, None)
    dead = jnp.maximum(-(-count // plan.rows) - live - split, 0)
    jax.lax.fori_loop(0, jax.lax.div(dead + (plan.splits - 1), plan.splits), dead_block, None)


def _masses(
    rows: Rows, *, slots: Slots, arrays: _Arrays, plan: Plan, kind: str, interpret: bool
) -> tuple[Float[Array, "slots"], ...]:
    """Of each field, what the shares of some rows of queries come to."""
    asked = arrays.asked
    read = functools.partial(Reader, slots=slots, interpret=interpret)
    keys = list(map(read, asked.keys, plan.key_groups, asked.tables))
    level = arrays.level[rows.where]
    found = []
    for index in range(plan.fields):
        field = field_of(index, slots, asked, rows)
        visible = field.visible if rows.inside is None else field.visible & rows.inside[None, :]
        shares = jnp.exp2(scores_of(keys, field, rows) - level[None, :])
        if kind == "low":
            shares = (shares < arrays.uniform[rows.where][None, :]).astype(jnp.float32)
        shares = jnp.where(visible, shares, 0.0)
        found.append(jnp.max(shares, axis=1) if kind == "peak" else jnp.sum(shares, axis=1))
    return tuple(found)
