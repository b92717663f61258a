"""Decode attention over coded keys and values on a TPU: integers of 8, 4 and 2 bits with a scale a token.

This file lays the arrays out and makes the call, `mosaic_codes_body.py` computes a step, `mosaic_plan.py` says how much
that is. Queries become integers of 16 bits in two planes of bytes, in a unit that the queries of a head share.
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
from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import mosaic_codes_body
from kernels_pallas.decode_attention.mosaic_plan import Plan, classes, last_live

_DITHERS = 16  # tiles


@functools.partial(jax.jit, static_argnames=("plan", "scale", "interpret"))
def run(
    plan: Plan,
    queries: Float[Array, "B k Q D"],
    keys: Coded,
    values: Coded,
    *,
    bias: Float[Array, "B k Q"] | None,
    positions: Int[Array, "B #k S"],
    query_positions: Int[Array, "B Q"],
    live: Int[Array, "B"],
    scale: float,
    interpret: Any,
) -> tuple[Float[Array, "B k Q V"], Float[Array, "B k Q"], Float[Array, "B k Q"]]:
    """Lays the arrays out and runs the kernel; traced once for all layers that are alike.

    Args:
      plan: see `plan_for`.
      queries: float32.
      keys: codes with a float16 scale a token.
      values: the same.
      bias: of each query's products, times the scale already.
      positions: of the slots.
      query_positions: of the rows, the same for all heads.
      live: blocks of each sequence that hold a slot which a query sees.
      scale: of products.
      interpret: see `pl.pallas_call`.

    Returns:
      Unscaled output, maximum (natural) and sum of weights.
    """
    batch, stored = queries.shape[:2]
    groups = stored // plan.heads
    log2e = math.log2(math.e)
    planes, unit, whole_sum = _as_integers(queries)

    def of_step(array: jax.Array, *sizes: int) -> jax.Array:
        """`B k ...` as `B k/heads heads ...`, with sizes of its own behind; as it is where a step has all heads."""
        return array.reshape(batch * groups, plan.heads, *sizes)

    def on_lanes(array: Float[Array, "B k Q"]) -> jax.Array:
        return of_step(jnp.broadcast_to(array[..., None], (*array.shape, LANES)), plan.rows, LANES)

    unit = jnp.broadcast_to((unit * (scale * log2e))[..., None], (batch, stored, LANES))
    inputs = [of_step(unit, LANES), _side_by_side(of_step(planes, *planes.shape[2:]), plan), on_lanes(whole_sum)]
    if plan.biased:
        inputs.append(on_lanes(bias * log2e))
    if not plan.one_position:
        inputs.append(jnp.broadcast_to(query_positions[..., None], (*query_positions.shape, LANES)))
    shared = positions.shape[1] == 1
    inputs.append(positions if shared else of_step(positions, plan.num_slots))
    for part in (keys, values):
        inputs.append(of_step(part.planes[0], *part.planes[0].shape[2:]))
        inputs.append(of_step(jax.lax.bitcast_convert_type(part.scale, jnp.int16), plan.num_slots))
    inputs += [_table(levels) for levels in (plan.key_levels, plan.value_levels) if levels is not None]
    inputs.append(_dither())
    newest = jnp.max(query_positions, axis=1)
    output, maximum, total = _call(plan, inputs, live, newest, shared=shared, groups=groups, interpret=interpret)
    output = output.reshape(batch, stored, plan.rows, -1)
    maximum, total = (array[..., 0].reshape(batch, stored, plan.rows) for array in (maximum, total))
    return output, maximum * math.log(2.0), total


def _as_integers(
    queries: Float[Array, "B k Q D"],
) -> tuple[Int[Array, "B k P D"], Float[Array, "B k"], Float[Array, "B k Q"]]:
    """Two planes of bytes, high ones first, the unit of a head's queries, and the sum of each in this unit.

    Of wide heads the largest is less than two bytes hold, so that products with bytes fit 32 bits.
    """
    most = min(127 * 256 + 127, (2**31 - 1) // (128 * queries.shape[3]))
    unit = jnp.max(jnp.abs(queries), axis=(2, 3)) / most
    whole = jnp.round(queries / jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)[..., None, None]).astype(jnp.int32)
    high = (whole + 128) >> 8
    planes = jnp.concatenate([high, whole - (high << 8)], axis=2).astype(jnp.int8)
    return planes, unit, jnp.sum(whole, axis=-1).astype(jnp.float32)


def _side_by_side(planes: Int[Array, "steps heads rows D"], plan: Plan) -> Int[Array, "steps _ _ _"]:
    """Queries of heads that share a pass: each its own columns, and zeros in the others'."""
    if plan.beside == 1:
        return planes
    steps, heads, rows, width = planes.shape
    pairs = planes.reshape(steps, heads // 2, 2, rows, width)
    zeros = jnp.zeros_like(pairs[:, :, 0])
    first = jnp.concatenate([pairs[:, :, 0], zeros], axis=3)
    second = jnp.concatenate([zeros, pairs[:, :, 1]], axis=3)
    return jnp.concatenate([first, second], axis=2)


def _table(levels: tuple[int, ...]) -> Int[Array, "32 128"]:
    """A tile of bytes, a level on each row."""
    padded = jnp.asarray(levels + (0,) * (32 - len(levels)), jnp.int8)
    return jnp.broadcast_to(padded[:, None], (32, LANES))


def _dither() -> Float[Array, "tiles 8 128"]:
    """Numbers from -1/2 to 1/2 without a pattern, for eight rows; tiles of slots take them in turn."""
    golden = jax.lax.iota(jnp.float32, _DITHERS * 8 * LANES) * 0.6180339887 % 1.0
    return (golden - 0.5).reshape(_DITHERS, 8, LANES)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Which part of each array a step gets; steps are (some heads of a sequence, block of slots)."""

    plan: Plan
    groups: int  # steps of a sequence

    def of_heads(self, *sizes: int) -> pl.BlockSpec:
        """An array `steps ...` that all blocks see."""
        return pl.BlockSpec((1, *sizes), lambda step, block, *_: (step,) + (0,) * len(sizes))

    def of_sequence(self, *sizes: int) -> pl.BlockSpec:
        """An array `B ...` that all heads and blocks see."""
        return pl.BlockSpec((1, *sizes), lambda step, block, *_: (self._row(step),) + (0,) * len(sizes))

    def bytes_of(self, bits: int, width: int) -> pl.BlockSpec:
        """Codes `steps heads bytes D`."""
        size = (1, self.plan.heads, self.plan.slots // classes(bits), width)
        return pl.BlockSpec(size, lambda step, block, live, _: (step, 0, self._live(step, block, live), 0))

    def on_lanes(self) -> pl.BlockSpec:
        """An array `steps heads S`."""
        size = (1, self.plan.heads, self.plan.slots)
        return pl.BlockSpec(size, lambda step, block, live, _: (step, 0, self._live(step, block, live)))

    def on_lanes_of_all(self) -> pl.BlockSpec:
        """An array `B 1 S` that heads share."""
        size = (1, 1, self.plan.slots)
        return pl.BlockSpec(size, lambda step, block, live, _: (self._row(step), 0, self._live(step, block, live)))

    def _row(self, step: jax.Array) -> jax.Array:
        return jax.lax.div(step, self.groups)

    def _live(self, step: jax.Array, block: jax.Array, live: jax.Ref) -> jax.Array:
        return last_live(self._row(step), block, live)


def _call(
    plan: Plan,
    inputs: list[jax.Array],
    live: Int[Array, "B"],
    newest: Int[Array, "B"],
    *,
    shared: bool,
    groups: int,
    interpret: Any,
) -> Any:
    """The call."""
    heads, rows, grid = plan.heads, plan.rows, _Grid(plan, groups)
    tables = (plan.key_levels is not None) + (plan.value_levels is not None)
    specs = [
        grid.of_heads(heads, LANES),
        grid.of_heads(*inputs[1].shape[1:]),
        *[grid.of_heads(heads, rows, LANES)] * (2 if plan.biased else 1),
        *[grid.of_sequence(rows, LANES)] * (not plan.one_position),
        grid.on_lanes_of_all() if shared else grid.on_lanes(),
        grid.bytes_of(plan.key_bits, plan.key_width),
        grid.on_lanes(),
        grid.bytes_of(plan.value_bits, plan.value_width),
        grid.on_lanes(),
        *[pl.BlockSpec((32, LANES), lambda *_: (0, 0))] * tables,
        pl.BlockSpec(inputs[-1].shape, lambda *_: (0, 0, 0)),
    ]
    outs = [grid.of_heads(heads, rows, width) for width in (plan.value_width, LANES, LANES)]
    tiles, width = plan.tiles, -(-plan.value_width // LANES)
    scratch = [pltpu.VMEM((tiles, heads, LANES), jnp.float32)] * 3
    if not plan.one_position:
        scratch.append(pltpu.VMEM((tiles, heads, LANES), jnp.int32))
    scratch.append(pltpu.VMEM((heads, tiles, rows, LANES), jnp.float32))
    scratch += [pltpu.VMEM((heads, rows, LANES), jnp.float32)] * 3
    scratch.append(pltpu.VMEM((heads, width, 4 * rows, LANES), jnp.int32))
    steps = inputs[0].shape[0]
    return pl.pallas_call(
        functools.partial(mosaic_codes_body.kernel, plan=plan, groups=groups),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(steps, -(-plan.num_slots // plan.slots)),
            in_specs=specs,
            out_specs=outs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct((steps, *spec.block_shape[1:]), jnp.float32) for spec in outs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="decode_attention",
    )(live, newest, *inputs)
