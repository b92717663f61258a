"""Scores on a TPU: codes go to the matrix unit once, and both terms come out of the same pass.

    grid (B, k / heads a step, blocks of slots), in each step up to 1,024 slots of a head at a time

    [ rows ]                        products [Q S]          what the first term adds
    [  A   ]  x  codes   ->         keys     [D S]          slots on lanes, so that scales of tokens are rows
     R          R S
                                    lengths  [D/2 S]        of keys' upper and lower half
    [ weights ] x lengths ->        [Q S]                   what the second term adds

How codes become numbers, and where these lie, is attention's (`decode_attention/mosaic_parts.py`, `mosaic_floats.py`).
Rows and weights come as two bfloat16, what the first lacks in the second; A and lengths as one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas._tpu import VMEM
from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import mosaic_parts
from kernels_pallas.decode_attention import mosaic_tpu as attention
from kernels_pallas.decode_attention.mosaic_floats import Grid, Plan, inputs_of, scratch_of
from kernels_pallas.decode_attention.mosaic_floats_body import Step, clean, for_heads, keys_of
from kernels_pallas.decode_attention.mosaic_parts import Layout, OfHead, split
from kernels_pallas.decode_attention.reference import live_slots
from kernels_pallas.score.reference import StoredKeys

_LEAST_SLOTS = 256  # what an exact segment holds is read by XLA
_MOST_NUMBERS = 256  # D: a step has the keys of 1,024 slots in fast memory
_MOST_TURNED = 2048  # D C, of C groups of channels: as many numbers of a slot leave the matrix unit at once
_CHUNKS = (1024, 512, 256)  # one goes through the matrix unit while the one before leaves it: the longer, the better
_BANDS = 8  # halves begin at whole tiles of 8 numbers
_NEVER = (1 << 31) - 2  # a position that all tokens come before


def unsupported(keys: StoredKeys, num_heads: int, device: str) -> str | None:
    """Why keys cannot be scored; None if they can.

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      device: kind of the device, e.g. "TPU v6 lite".
    """
    size = sum(part.planes[0].shape[3] for part in keys.parts if isinstance(part, Coded))
    queries = jax.ShapeDtypeStruct((keys.positions.shape[0], 1, num_heads, size), jnp.float32)
    if (reason := attention.unsupported(keys.segment(queries), device)) is not None:
        return reason
    stored = keys.parts[0].num_heads
    own = (keys.basis is not None and keys.basis.ndim > 2) or keys.mean is not None
    if own and stored != keys.num_kv_heads:
        return "heads share what is stored, and turn it back each in its own way"
    if keys.owners is None and keys.positions.shape[1] not in (1, stored):
        return "heads that hold tokens of their own share stored keys"
    if (slots := keys.positions.shape[2]) < _LEAST_SLOTS:
        return f"there are {slots} slots, fewer than {_LEAST_SLOTS}"
    size = size if keys.basis is None else keys.basis.shape[-2]
    if size > _MOST_NUMBERS or size % (2 * _BANDS):
        return f"keys have {size} numbers, more than {_MOST_NUMBERS} or halves that are not multiples of {_BANDS}"
    turned = size * max(1, *(layout.groups for layout in plan_for(keys, num_heads, device).keys))
    if turned > _MOST_TURNED:
        return f"keys and their groups of channels make {turned} numbers, more than {_MOST_TURNED}"
    return None


def plan_for(keys: StoredKeys, num_heads: int, device: str) -> Plan:
    """What the kernel for keys that are not `unsupported` is written for.

    Args:
      keys: arrays, or their shapes.
      num_heads: N.
      device: the kind.
    """
    size = sum(part.planes[0].shape[3] for part in keys.parts)
    queries = jax.ShapeDtypeStruct((keys.positions.shape[0], 1, num_heads, size), jnp.float32)
    return attention.float_plan(keys.segment(queries), (), 1.0, device)


def score(
    keys: StoredKeys,
    rows: Float[Array, "B N D"] | None,
    weights: Float[Array, "#B N half"] | None,
    *,
    device: str,
    interpret: Any = False,
) -> Float[Array, "B N S"]:
    """See `reference.score`.

    Args:
      keys: not `unsupported`.
      rows: or None; one of both is given.
      weights: or None.
      device: kind of the device.
      interpret: run on any device, step by step; True, or how (`pltpu.InterpretParams`).
    """
    batch, num_heads = keys.positions.shape[0], (weights if rows is None else rows).shape[1]
    size, bias = sum(part.planes[0].shape[3] for part in keys.parts), None
    if rows is None:
        rows = jnp.zeros((batch, num_heads, size), jnp.float32)
    else:
        rows, bias = keys.for_stored(rows)
    plan = plan_for(keys, num_heads, device)
    segment = attention.owned(keys.segment(rows[:, None], None if bias is None else bias[:, None]))
    never = jnp.full((batch, 1), _NEVER, jnp.int32)
    queries, given = attention.rows_of(segment, never, 1.0, plan.rows)
    given |= attention.pool_of(segment, never, plan.rows)
    live = -(-live_slots(never, segment.positions) // plan.slots)
    group = num_heads // keys.parts[0].num_heads
    found = _run(plan, queries, keys, weights, live=live, group=group, interpret=interpret, **given)
    return found.reshape(batch, num_heads, -1)


@functools.partial(jax.jit, static_argnames=("plan", "group", "interpret"))
def _run(
    plan: Plan,
    queries: Float[Array, "B k Q R"],
    keys: StoredKeys,
    weights: Float[Array, "#B N half"] | None,
    *,
    bias: Float[Array, "B k Q"] | None,
    live: Int[Array, "B"],
    group: int,
    interpret: Any,
    **given: Any,
) -> Float[Array, "B k G S"]:
    """Lays the arrays out and runs the kernel; traced once for all layers that are alike.

    Args:
      plan: see `mosaic_floats.plan_for`; without values.
      queries: rows as what is stored wants them.
      keys: as they are stored.
      weights: or None.
      bias: added to each row's products, or None.
      live: blocks of each sequence that hold a key.
      group: N / k.
      interpret: see `pl.pallas_call`.
      given: the other arguments of `mosaic_floats.inputs_of`.
    """
    batch, stored = queries.shape[:2]
    grid = Grid(plan, stored // plan.heads)
    inputs = inputs_of(plan, queries, keys.parts, bias=None, **given)
    first = 0
    for index, layout in enumerate(plan.keys):
        if layout.plain and layout.dtype == "bfloat16":
            own = jnp.concatenate(split(queries[..., first : first + layout.size]), axis=2)
            inputs[f"key{index}.rows"] = own, grid.of_heads(*own.shape[2:])
        first += layout.size
    if bias is not None:
        inputs["constant"] = bias[..., None], grid.of_heads(plan.rows, 1)
    if weights is not None:
        own = weights.reshape(weights.shape[0], stored, group, -1)
        own = jnp.pad(own, [(0, 0), (0, 0), (0, plan.rows - group), (0, 0)])
        inputs["weights"] = _placed(jnp.concatenate(split(own), axis=2), grid)
        inputs |= _back_of(plan, keys, grid)
    scratch = scratch_of(plan, inputs)
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan, names=(*inputs, "score", *scratch)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, grid.groups, -(-plan.num_slots // plan.slots)),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=pl.BlockSpec(
                (1, plan.heads, group, plan.slots), lambda row, some, block, *_: (row, some, 0, block)
            ),
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, stored, group, plan.num_slots), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="score",
    )(live, *[array for array, _ in inputs.values()])


def _placed(array: Float[Array, "#B #k ..."], grid: Grid) -> tuple[jax.Array, pl.BlockSpec]:
    """An array that sequences, or heads, may share."""
    batched, own, rest = array.shape[0] > 1, array.shape[1] > 1, (0,) * (array.ndim - 2)
    shape = (1, grid.plan.heads if own else 1, *array.shape[2:])
    return array, pl.BlockSpec(shape, lambda row, some, *_: (row if batched else 0, some if own else 0, *rest))


def _back_of(plan: Plan, keys: StoredKeys, grid: Grid) -> dict[str, tuple[jax.Array, pl.BlockSpec]]:
    """A for each part, once for each group of channels with zeros outside it, and its sums; and the mean."""
    width = sum(layout.size for layout in plan.keys)
    basis = jnp.eye(width, dtype=jnp.float32) if keys.basis is None else jnp.asarray(keys.basis, jnp.float32)
    basis = basis.astype(jnp.bfloat16).reshape(*(1,) * (4 - basis.ndim), *basis.shape)  # B|1 k|1 D R
    inputs, first = {}, 0
    for index, layout in enumerate(plan.keys):
        own, groups = basis[..., first : first + layout.size], max(layout.groups, 1)
        group_of = jnp.arange(layout.size, dtype=jnp.int32)[None] * groups // layout.size
        inside = group_of == jnp.arange(groups, dtype=jnp.int32)[:, None]
        parted = jnp.where(inside[None, None, :, None], own[:, :, None], jnp.zeros((), own.dtype))  # B k C D R
        rows = parted * jnp.asarray(layout.unit, parted.dtype)
        inputs[f"back{index}"] = _placed(rows.reshape(*rows.shape[:2], -1, layout.size), grid)
        if mosaic_parts.adds(layout):
            sums = jnp.sum(parted.astype(jnp.float32), axis=-1, keepdims=True)
            inputs[f"back{index}.sums"] = _placed(sums, grid)
        first += layout.size
    if keys.mean is not None:
        mean = keys.mean if keys.mean.ndim == 3 else keys.mean[None]
        inputs["mean"] = _placed(mean[..., None], grid)
    return inputs


def _kernel(live: jax.Ref, *refs: jax.Ref, plan: Plan, names: tuple[str, ...]) -> None:
    """One block of slots of some heads."""
    step, row = Step(plan, names, refs), pl.program_id(0)

    @pl.when(step.block >= live[row])
    def _() -> None:
        step.ref["score"][...] = jnp.zeros_like(step.ref["score"])

    @pl.when(step.block < live[row])
    def _() -> None:
        clean(step)
        for_heads(plan, functools.partial(_score_head, step))


def _score_head(step: Step, head: Any) -> None:
    """The slots of one head; what comes first of one chunk hides behind what comes last of the one before."""
    plan, chunk = step.plan, chunk_of(step.plan)
    products = _Products(step, head)
    weights, group = _of_head(step, "weights", head), step.ref["score"].shape[2]

    def finish(start: int, total: Any, keys: Any) -> None:
        if weights is not None:
            total = total + _second_term(weights, keys)
        visible = step.visible(head, pl.ds(start, chunk))
        step.ref["score"][0, head, :, start : start + chunk] = jnp.where(visible, total, 0.0)[:group]

    pending = None
    for start in range(0, plan.slots, chunk):
        found = start, *products.of(start, chunk)
        if pending is not None:
            finish(*pending)
        pending = found
    finish(*pending)


class _Products:
    """What the matrix unit makes of a head's codes."""

    def __init__(self, step: Step, head: Any):
        self._head, self._parts = head, keys_of(step, head)
        self._constant, self._mean = _of_head(step, "constant", head), _of_head(step, "mean", head)
        names = [f"back{index}" for index in range(len(self._parts))]
        self._backs = [(_of_head(step, name, head), _of_head(step, f"{name}.sums", head)) for name in names]

    def of(self, start: int, count: int) -> tuple[Float[Array, "Q S"], Any]:
        """The first term, and the keys or None, of some slots."""
        total, keys, slots = self._constant, self._mean, slice(start, start + count)
        for (layout, part, own, rows, sums), (back, back_sums) in zip(self._parts, self._backs, strict=True):
            codes = mosaic_parts.numbers(layout, part, own, self._head, start, count)
            products, turned = _multiply(layout, rows, back, codes)
            total = _add(total, _first_term(layout, products, sums, own, slots))
            if back is not None:
                keys = _add(keys, _keys(layout, turned, back_sums, own, slots))
        return total, keys


def chunk_of(plan: Plan) -> int:
    """Slots that go through the matrix unit together."""
    return next((count for count in _CHUNKS if plan.slots % count == 0), plan.slots)


def _of_head(step: Step, name: str, head: Any) -> Any:
    """What belongs to a head of an array that heads may share; None where there is none."""
    ref = step.ref.get(name)
    return None if ref is None else ref[0, 0 if ref.shape[1] == 1 else head]


def _add(total: Any, new: Any) -> Any:
    """The sum, or the only one that there is."""
    return new if total is None else total + new


def _multiply(layout: Layout, rows: jax.Array, back: Any, codes: jax.Array) -> tuple[jax.Array, Any]:
    """Products of codes with rows and with A, in one pass but for float32."""
    if back is None:
        return mosaic_parts.multiply(layout, rows, codes), None
    if codes.dtype == jnp.float32:
        turned = mosaic_parts.multiply(layout, back, codes.astype(jnp.bfloat16))
        return mosaic_parts.multiply(layout, rows, codes), turned
    both, count = mosaic_parts.multiply(layout, jnp.concatenate([rows, back], axis=0), codes), rows.shape[0]
    return both[:count], both[count:]


def _first_term(layout: Layout, products: jax.Array, sums: Any, own: OfHead, slots: slice) -> Float[Array, "Q S"]:
    """Products of rows with numbers."""
    if layout.plain and layout.dtype == "float32":
        return products
    groups = layout.copies // 2 if not layout.plain else 1
    parted = jnp.split(products, 2 * groups, axis=0)
    both = [high + low for high, low in zip(parted[::2], parted[1::2], strict=True)]
    return both[0] if layout.plain else mosaic_parts.meet(layout, both, sums, own, slots)


def _keys(layout: Layout, products: jax.Array, sums: Any, own: OfHead, slots: slice) -> Float[Array, "D S"]:
    """What a part adds to the keys."""
    if layout.plain:
        return products
    return mosaic_parts.meet(layout, jnp.split(products, max(layout.groups, 1), axis=0), sums, own, slots)


def _second_term(weights: Float[Array, "_ half"], keys: Float[Array, "D S"]) -> Float[Array, "Q S"]:
    """Weighted lengths of bands."""
    first, second = jnp.split(keys, 2, axis=0)
    squares = first * first + second * second
    lengths = (squares * jax.lax.rsqrt(squares + 1e-30)).astype(jnp.bfloat16)
    high, low = jnp.split(jnp.dot(weights, lengths, preferred_element_type=jnp.float32), 2, axis=0)
    return high + low
