"""The cache: a tuple of per-layer caches and a count of tokens per sequence, all plain pytrees of fixed shapes.

    KVCache
      num_seen   [B]               tokens that a sequence has seen; the next one's position
      layers     one LayerCache a layer
        exact    ExactSegment      newest tokens (and sinks) in the model's dtype
          keys      [B K S D]      rotated at the position of their slot
          values    [B K S D]
          positions [B S]          -1 = empty slot
        body     None              older tokens, coded (policies with codecs)
        state    None              owned by the selection (policies that evict)

There is no length, mask or validity array: all three follow from positions. What lies in an empty slot cannot matter.
A cache is an argument and a result, never a module's variable; every update returns a new one, and the compiled steps
donate the old one, so that its buffers are updated in place.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax.policy import Policy
from kvjax.sharding import Placement

KEY_AXES = "B K S D"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What caches and decoding need to know of a model.

    Attributes:
      num_layers: L.
      num_query_heads: N.
      num_kv_heads: K, a divisor of N.
      head_size: D.
      dtype: name of the dtype of keys and values, e.g. "bfloat16".
      vocab_size: V, one past the largest token id.
      sliding_window: tokens that a query sees at most, None for all.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    vocab_size: int
    sliding_window: int | None = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "positions"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSegment:
    """A ring of the newest tokens of a layer: the token at position p lies in slot p mod S.

    Attributes:
      keys: `B K S D`, rotated at their own position.
      values: `B K S D`.
      positions: `B S` int32, one for all heads; -1 is an empty slot.
    """

    keys: Any
    values: Any
    positions: Any

    @property
    def num_slots(self) -> int:
        """S, the capacity."""
        return self.positions.shape[-1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("exact", "body", "state"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The cache of one layer.

    Attributes:
      exact: tokens in the model's dtype.
      body: coded older tokens, or None.
      state: whatever the selection carries from step to step, or None.
    """

    exact: Any
    body: Any = None
    state: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "num_seen"),
    meta_fields=("policy", "shape", "max_tokens", "placement"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The cache of a batch of sequences.

    Attributes:
      layers: one `LayerCache` a layer; capacities may differ.
      num_seen: `B` int32, tokens seen by each sequence.
      policy: what is kept (static).
      shape: facts of the model (static).
      max_tokens: tokens that a sequence may see in all (static).
      placement: where the arrays live (static).
    """

    layers: Any
    num_seen: Any
    policy: Policy
    shape: ModelShape
    max_tokens: int
    placement: Placement


def empty_cache(
    shape: ModelShape, *, policy: Policy, batch: int, max_tokens: int, placement: Placement = Placement()
) -> KVCache:
    """An empty cache, on the device(s) of `placement`.

    Args:
      shape: facts of the model.
      policy: what is kept.
      batch: B, sequences.
      max_tokens: tokens, prompt and new ones together, that a sequence may see.
      placement: where the arrays live.
    """
    return _build(shape, policy, batch, max_tokens, placement)


@functools.lru_cache(maxsize=8)  # on a mesh it compiles, and a run asks for the same few caches again and again
def abstract_cache(
    shape: ModelShape, *, policy: Policy, batch: int, max_tokens: int, placement: Placement = Placement()
) -> KVCache:
    """The same as shapes and shardings only, for compiling without memory; the devices need not be there."""
    lowered = _build.lower(shape, policy, batch, max_tokens, placement)
    shardings = lowered.compile().output_shardings if placement.mesh is not None else None
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.out_info)
    if shardings is None:
        return described
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), described, shardings
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))  # compiled: no device ever holds more than its part
def _build(shape: ModelShape, policy: Policy, batch: int, max_tokens: int, placement: Placement) -> KVCache:
    num_slots = policy.exact_slots(max_tokens)
    return KVCache(
        layers=tuple(_empty_layer(shape, batch, num_slots, placement) for _ in range(shape.num_layers)),
        num_seen=placement.constrain(jnp.zeros((batch,), jnp.int32), "B"),
        policy=policy,
        shape=shape,
        max_tokens=max_tokens,
        placement=placement,
    )


def _empty_layer(shape: ModelShape, batch: int, num_slots: int, placement: Placement) -> LayerCache:
    """One layer, all slots empty."""
    zeros = jnp.zeros((batch, shape.num_kv_heads, num_slots, shape.head_size), jnp.dtype(shape.dtype))
    exact = ExactSegment(
        keys=placement.constrain(zeros, KEY_AXES),
        values=placement.constrain(zeros, KEY_AXES),
        positions=placement.constrain(jnp.full((batch, num_slots), axes.EMPTY, jnp.int32), "B S"),
    )
    return LayerCache(exact=exact)


def new_positions(cache: KVCache, lengths: Int[Array, "B"], num_tokens: int) -> axes.Positions:
    """Positions of the next `num_tokens` tokens of each row; -1 past a row's length (padding on the right)."""
    offsets = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    return jnp.where(offsets < lengths[:, None], cache.num_seen[:, None] + offsets, axes.EMPTY)


def append(
    segment: ExactSegment,
    keys: axes.NewKeys,
    *,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> ExactSegment:
    """Writes new tokens over the oldest slots; tokens at position -1 are written nowhere.

    Args:
      segment: the ring.
      keys: `B T K D`, T at most S, already rotated.
      values: `B T K D`.
      positions: `B T`.
      placement: where the arrays live.
    """
    num_slots = segment.num_slots
    slots = jnp.where(positions >= 0, positions % num_slots, num_slots)  # S lies outside: dropped
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

    def write(cached: jax.Array, new: jax.Array) -> jax.Array:
        # Index arrays around a slice put their axes first: the updates are `B T K D`, as activations are.
        return placement.constrain(cached.at[rows, :, slots].set(new, mode="drop"), KEY_AXES)

    return ExactSegment(
        keys=write(segment.keys, keys),
        values=write(segment.values, values),
        positions=segment.positions.at[rows, slots].set(positions, mode="drop"),
    )


def fill(
    segment: ExactSegment,
    keys: axes.NewKeys,
    *,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> ExactSegment:
    """Writes a whole prompt into an empty segment: one block copy instead of `append`'s scatter.

    Args:
      segment: an empty ring of S slots.
      keys: `B T K D`, T at most S, already rotated.
      values: `B T K D`.
      positions: `B T`: 0, 1, ... and -1 past a row's length, where what is written cannot matter.
      placement: where the arrays live.
    """

    def write(cached: jax.Array, new: jax.Array) -> jax.Array:
        block = jnp.swapaxes(new, 1, 2)  # B K T D
        return placement.constrain(jax.lax.dynamic_update_slice(cached, block, (0, 0, 0, 0)), KEY_AXES)

    return ExactSegment(
        keys=write(segment.keys, keys),
        values=write(segment.values, values),
        positions=jax.lax.dynamic_update_slice(segment.positions, positions, (0, 0)),
    )


def device_bytes(tree: Any) -> int:
    """Bytes that the buffers of a pytree take on all devices together, as the devices report them."""
    buffers = [shard.data for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(buffer.on_device_size_in_bytes() for buffer in buffers)


def full_cache_bytes(cache: KVCache) -> int:
    """Bytes that the same cache would take with policy `full`, on all devices together, laid out in the same way."""
    full = abstract_cache(
        cache.shape,
        policy=Policy(),
        batch=cache.num_seen.shape[0],
        max_tokens=cache.max_tokens,
        placement=cache.placement,
    )
    return sum(_bytes_on_devices(leaf) for leaf in jax.tree.leaves(full.layers))


def _bytes_on_devices(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on all its devices, copies counted."""
    if leaf.sharding is None:
        return math.prod(leaf.shape) * leaf.dtype.itemsize
    shard = leaf.sharding.shard_shape(leaf.shape)
    return len(leaf.sharding.device_set) * math.prod(shard) * leaf.dtype.itemsize
