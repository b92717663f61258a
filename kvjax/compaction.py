"""Where kept tokens lie: those that stay keep their slot, and those that come take the slots of those that go.

    body         a b c d e f - -      c goes, p and q come
    body, after  a b p d e f q -      each head for itself; in a pool, all heads share one row of slots

Nothing that stays is moved: attention does not mind the order of slots, and a round writes no more slots than tokens
come.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import axes
from kvjax._kernels import Parts, StoredKeys, merge_heads, put_slots, take_slots
from kvjax.cache import Body, place_heads
from kvjax.evidence import Evidence
from kvjax.model_shape import ModelShape
from kvjax.sharding import Placement


def absorb(
    body: Body,
    state: Evidence,
    codes: tuple[Parts, Parts],
    *,
    positions: Int[Array, "B U"],
    numbers: dict[str, jax.Array],
    kept: Bool[Array, "B K units"],
    due: Bool[Array, "B"],
    unit: int,
    placement: Placement,
) -> tuple[Body, Evidence]:
    """The body, and the evidence beside it, after a round.

    Args:
      body: before the round.
      state: evidence.
      codes: of the keys and values that come, `B k U...`.
      positions: of the tokens that come.
      numbers: their evidence, name -> `B K U`.
      kept: candidates that stay: the body's slots, as each head sees them, then the tokens that come.
      due: rows in which there is a round; the others stay as they are.
      unit: slots that move together.
      placement: where arrays live.
    """
    heads = kept.shape[1]
    num_old = body.num_slots // unit
    stays, comes = kept[:, :, :num_old], kept[:, :, num_old:]
    spread = spread_heads(positions, heads)
    owners = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int32)[None, :, None], spread.shape)
    if body.owners is not None:
        stays, comes = jnp.any(stays, axis=1, keepdims=True), _merge(comes)
        codes = (merge_heads(codes[0]), merge_heads(codes[1]))
        spread, owners = _merge(spread), _merge(owners)
        numbers = {name: _merge(array) for name, array in numbers.items()}
    stays &= body.positions[:, :, ::unit] >= 0
    slots = _targets(~stays, comes & due[:, None, None], num_new=comes.shape[2])
    gone = jnp.repeat(~stays, unit, axis=2) & due[:, None, None]
    left = jnp.where(gone, axes.EMPTY, body.positions)
    keys, values = (
        place_heads(put_slots(old, new, slots, unit=unit, mesh=placement.mesh), placement)
        for old, new in zip((body.keys, body.values), codes, strict=True)
    )
    body = dataclasses.replace(
        body,
        keys=keys,
        values=values,
        positions=place_heads(put_numbers(left, spread, slots, unit=unit), placement),
        owners=None
        if body.owners is None
        else place_heads(put_numbers(body.owners, owners, slots, unit=unit), placement),
    )
    beside = {name: put_numbers(array, numbers[name], slots, unit=unit) for name, array in state.body.items()}
    return body, dataclasses.replace(state, body=place_heads(beside, placement))


def _targets(free: Bool[Array, "B K old"], comes: Bool[Array, "B K new"], *, num_new: int) -> Int[Array, "B K new"]:
    """The first free units for those that come, in order; -1 for those that do not."""
    first_free = index_of(free, num_new)
    ranks = jnp.maximum(jnp.cumsum(comes, axis=2, dtype=jnp.int32) - 1, 0)
    return jnp.where(comes, jnp.take_along_axis(first_free, ranks, axis=2), -1)


def fill_kept(
    body: Body,
    state: Evidence,
    scratch: Body,
    *,
    positions: Int[Array, "B S"],
    numbers: dict[str, jax.Array],
    kept: Bool[Array, "B K units"],
    unit: int,
    placement: Placement,
) -> tuple[Body, Evidence]:
    """An empty body filled with the kept candidates of a prompt.

    Args:
      body: empty.
      state: evidence.
      scratch: a body that holds all candidates.
      positions: of the candidates.
      numbers: their evidence, name -> `B K S`.
      kept: candidates that stay.
      unit: slots that move together.
      placement: where arrays live.
    """
    batch, heads, count = kept.shape
    spread = spread_heads(positions, heads)
    owners = jnp.broadcast_to(jnp.arange(heads, dtype=jnp.int32)[None, :, None], spread.shape)
    parts, pooled = (scratch.keys, scratch.values), body.owners is not None
    if pooled:
        parts = (merge_heads(parts[0]), merge_heads(parts[1]))
        kept, spread, owners = kept.reshape(batch, 1, heads * count), _merge(spread), _merge(owners)
        numbers = {name: _merge(array) for name, array in numbers.items()}
    source = index_of(kept, body.num_slots // unit)
    keys, values = (place_heads(take_slots(part, source, unit=unit), placement) for part in parts)
    body = dataclasses.replace(
        body,
        keys=keys,
        values=values,
        positions=place_heads(take_numbers(spread, source, unit=unit, empty=axes.EMPTY), placement),
        owners=place_heads(take_numbers(owners, source, unit=unit, empty=0), placement) if pooled else None,
        chosen=scratch.chosen,
    )
    beside = {name: take_numbers(array, source, unit=unit, empty=0.0) for name, array in numbers.items()}
    return body, dataclasses.replace(state, body=place_heads(beside, placement))


def take_numbers(array: Array, source: Int[Array, "B K units"], *, unit: int, empty: int | float) -> Array:
    """Slots of `B K S` as `source` names them; `empty` where it names none."""
    slots = _slots(source, unit)
    return jnp.where(
        slots >= 0, jnp.take_along_axis(array, jnp.maximum(slots, 0), axis=2), jnp.asarray(empty, array.dtype)
    )


def put_numbers(array: Array, new: Array, targets: Int[Array, "B K units"], *, unit: int) -> Array:
    """`B K S` with slots overwritten."""
    slots = _slots(targets, unit)

    def one(array: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
        return array.at[jnp.where(slots >= 0, slots, array.shape[0])].set(new, mode="drop")

    return jax.vmap(jax.vmap(one))(array, slots, new.astype(array.dtype))


def _slots(units: Int[Array, "B K units"], unit: int) -> Int[Array, "B K S"]:
    """The slots of units; -1 stays -1."""
    slots = units[..., None] * unit + jnp.arange(unit, dtype=jnp.int32)[None, None, None]
    return jnp.where(units[..., None] >= 0, slots, -1).reshape(*units.shape[:2], -1)


def index_of(kept: Bool[Array, "B K units"], size: int) -> Int[Array, "B K size"]:
    """Places of the first `size` kept units in ascending order; -1 behind them."""
    count = min(size, kept.shape[2])
    # The largest of these are the first; a running count and a scatter take three times as long on CPUs.
    order = jnp.where(kept, -jnp.arange(kept.shape[2], dtype=jnp.float32), -jnp.inf)
    found, index = jax.lax.top_k(order, count)
    index = jnp.where(found > -jnp.inf, index, -1)
    return jnp.pad(index, ((0, 0), (0, 0), (0, size - count)), constant_values=-1)


def spread_heads(array: Array, heads: int) -> Array:
    """`B S`, the same for all heads, as `B K S`."""
    return jnp.broadcast_to(array[:, None], (array.shape[0], heads, array.shape[1]))


def write_rows(old: Array, new: Array, starts: Int[Array, "B"], due: Bool[Array, "B"], *, axis: int) -> Array:
    """Rows with `new` written along an axis from each row's start on; those that are not due stay as they are.

    A window that does not fit is dropped whole. Were what lies there read and written back instead, TPUs would copy the
    whole array into another layout to read it.
    """
    window = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(new.ndim - 1)),
        inserted_window_dims=(),
        scatter_dims_to_operand_dims=(axis - 1,),
    )

    def row(old: jax.Array, new: jax.Array, start: jax.Array, due: jax.Array) -> jax.Array:
        start = jnp.where(due, start, old.shape[axis - 1])[None]
        drop = jax.lax.GatherScatterMode.FILL_OR_DROP
        return jax.lax.scatter(old, start, new, window, unique_indices=True, mode=drop)

    return jax.vmap(row)(old, new, starts, due)


def _merge(array: jax.Array) -> jax.Array:
    """`B K S` as `B 1 K*S`."""
    return array.reshape(array.shape[0], 1, -1)


def seen_body(
    body: Body, state: Evidence, shape: ModelShape
) -> tuple[StoredKeys, Float[Array, "B K S D"], Int[Array, "B K S"], dict[str, jax.Array]]:
    """Keys as they are stored, and decoded values, positions and evidence of a body as each head sees it.

    Each sees its own slots alone. Keys and values of empty slots are whatever lies there.
    """
    key_codec, value_codec = body.codecs
    heads, values = shape.num_kv_heads, body.values
    keys = key_codec.stored(body.keys, positions=body.positions, owners=body.owners, arrays=body.arrays(0))
    sizes = (body.positions.shape[0], heads, body.num_slots)
    positions = jnp.broadcast_to(body.positions, sizes)
    if body.owners is not None:
        values = _every_head(values, heads)
        own = body.owners == jnp.arange(heads, dtype=jnp.int32)[None, :, None]  # B K S
        positions = jnp.where(own, positions, axes.EMPTY)
    decoded = value_codec.decode(values, positions=positions, arrays=body.arrays(1))
    held = positions >= 0
    numbers = {name: jnp.where(held, array, 0.0) for name, array in state.body.items()}
    return keys, decoded, positions, numbers


def _every_head(parts: Parts, heads: int) -> Parts:
    """Parts of a pool, `B 1 S...`, as each head's."""

    def spread(array: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        del axis, entries
        return jnp.broadcast_to(array, (array.shape[0], heads, *array.shape[2:]))

    return tuple(part.map_tokens(spread) for part in parts)
