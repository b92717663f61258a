"""Attention mass on a TPU: what the weights of each slot come to, by a second walk that reads keys alone.

share[q, s] = 2^(score[q, s] - level[q])        level: log2 of what the weights of all segments come to
mass[s]     = sum, largest, or number under 1 / seen of the shares, over the Q rows of a head
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas._tpu import MASKED, VMEM
from kernels_pallas.coded import Parts
from kernels_pallas.decode_attention.mosaic_floats import Grid, Plan, inputs_of, scratch_of
from kernels_pallas.decode_attention.mosaic_floats_body import Step, clean, for_heads, scores_of


@functools.partial(jax.jit, static_argnames=("plan", "mass", "group", "interpret"))
def run(
    plan: Plan,
    queries: Float[Array, "B k Q _"],
    keys: Parts,
    *,
    level: Float[Array, "B k Q"],
    uniform: Float[Array, "B k Q"],
    live: Int[Array, "B"],
    mass: str,
    group: int,
    interpret: Any,
    **given: Any,
) -> Float[Array, "B k S"]:
    """Lays the arrays out and runs the kernel.

    Args:
      plan: see `mosaic_floats.plan_for`; without values.
      queries: float32.
      keys: as they are stored.
      level: natural logarithm of what each row's weights come to.
      uniform: 1 / slots that a row sees.
      live: blocks of each sequence that hold a slot which a query sees.
      mass: one of `reference.MASSES`.
      group: G.
      interpret: see `pl.pallas_call`.
      given: the other arguments of `mosaic_floats.inputs_of`.
    """
    batch, stored, rows = queries.shape[:3]
    grid = Grid(plan, stored // plan.heads)
    inputs = inputs_of(plan, queries, keys, **given)
    inputs["level"] = (level * math.log2(math.e))[..., None], grid.of_heads(rows, 1)
    if mass == "low":
        inputs["uniform"] = uniform[..., None], grid.of_heads(rows, 1)
    scratch = scratch_of(plan, inputs)
    found = pl.pallas_call(
        functools.partial(_kernel, plan=plan, names=(*inputs, "mass", *scratch), mass=mass, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, grid.groups, -(-plan.num_slots // plan.slots)),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=grid.out_of_tokens(),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((batch * grid.groups, plan.heads, plan.num_slots), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="attention_mass",
    )(live, *[array for array, _ in inputs.values()])
    return found.reshape(batch, stored, plan.num_slots)


def _kernel(live: jax.Ref, *refs: jax.Ref, plan: Plan, names: tuple[str, ...], mass: str, group: int) -> None:
    """One block of slots of some heads."""
    step, row = Step(plan, names, refs), pl.program_id(0)

    @pl.when(step.block >= live[row])
    def _() -> None:
        step.ref["mass"][...] = jnp.zeros_like(step.ref["mass"])

    @pl.when(step.block < live[row])
    def _() -> None:
        clean(step)
        for_heads(plan, functools.partial(_weigh, step, mass, group))


def _weigh(step: Step, mass: str, group: int, head: Any) -> None:
    """The slots of one head."""
    visible = step.visible(head)
    scores = jnp.where(visible, scores_of(step, head), MASKED)
    shares = jnp.exp2(scores - step.ref["level"][0, head])
    if mass == "low":
        shares = jnp.where(visible & (shares < step.ref["uniform"][0, head]), 1.0, 0.0)
    if mass == "peak":
        found = jnp.max(shares, axis=0, keepdims=True)
    else:
        found = jnp.sum(shares, axis=0, keepdims=True) * (1.0 / group)
    step.ref["mass"][0, pl.ds(head, 1)] = found
