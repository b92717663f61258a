"""What a cache takes and holds: stated bits from its codecs, real bytes from its buffers, tokens kept and evicted.

Nothing is counted while decoding: what is kept follows from positions, and what is gone from what has been seen.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KEY_AXES, KVCache, LayerCache
from kvjax.empty import abstract_cache
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.sharding import Placement
from kvjax.statistics import Statistics


def account(cache: KVCache) -> dict[str, Any]:
    """Bits and bytes of a cache, for the report.

    Args:
      cache: a cache on devices.

    Returns:
      For the whole: `stated_bytes` (what codecs and exact segments say: body slots times the codec's bits with every
      scale counted, exact slots times the dtype's), `device_bytes` (from buffers: positions and codecs' own arrays
      included, copies on other devices too), `key_bits` and `value_bits` a number of the body, `ratio_to_dtype` and
      `ratio_to_bfloat16`: uncompressed bytes of `max_tokens` tokens over device bytes. `layers` holds the same for
      each layer, and what its selection gathers (`evidence_bytes`, which is in `device_bytes`).
    """
    uncompressed = full_cache_bytes(cache)
    item = jnp.dtype(cache.shape.dtype).itemsize
    layers = [_layer(cache, layer, uncompressed / len(cache.layers), item) for layer in cache.layers]
    total = {name: sum(layer[name] for layer in layers) for name in ("stated_bytes", "device_bytes")}
    bits = {name: float(np.mean([layer[name] for layer in layers])) for name in ("key_bits", "value_bits")}
    return {
        **total,
        **bits,
        **_ratios(uncompressed, total["device_bytes"], item),
        "layers": layers,
    }


def _layer(cache: KVCache, layer: LayerCache, uncompressed: int | float, item: int) -> dict[str, Any]:
    """The account of one layer."""
    exact, body, shape = layer.exact, layer.body, cache.shape
    numbers_per_slot = exact.keys.shape[0] * shape.num_kv_heads * shape.head_size
    bits = [8.0 * item, 8.0 * item]
    body_slots = 0
    if body is not None:
        body_slots = body.num_slots if body.owners is None else body.num_slots / shape.num_kv_heads
        bits = [codec.bits_per_element(arrays) for codec, arrays in zip(body.codecs, body.fitted, strict=True)]
    stated_bits = numbers_per_slot * (body_slots * sum(bits) + exact.num_slots * 16.0 * item)
    real = device_bytes(layer)
    return {
        "exact_slots": exact.num_slots,
        "body_slots": body_slots,
        "key_bits": bits[0],
        "value_bits": bits[1],
        "stated_bytes": round(stated_bits / 8),
        "device_bytes": real,
        "evidence_bytes": device_bytes(layer.state),
        **_ratios(uncompressed, real, item),
    }


def _ratios(uncompressed: int | float, real: int, item: int) -> dict[str, float]:
    return {"ratio_to_dtype": uncompressed / real, "ratio_to_bfloat16": uncompressed * 2 / item / real}


def num_rounds(cache: KVCache) -> int:
    """Rounds that all rows have had together, those that a prompt took at once included."""
    if cache.layers[0].body is None:
        return 0
    sizes = cache.policy.exact
    seen = np.asarray(jax.device_get(cache.num_seen), np.int64)
    beyond = np.maximum(seen - sizes.sinks - sizes.window - sizes.round, 0)
    return int(np.sum(-(-beyond // sizes.round)))


def held_tokens(cache: KVCache) -> np.ndarray:
    """Tokens that each row's key/value heads hold, `B L K` int64."""
    return np.stack([np.sum(positions >= 0, axis=2) for positions in _positions(cache)], axis=1)


def num_evicted(cache: KVCache) -> int:
    """Tokens that all rows, layers and heads together no longer hold."""
    seen = np.asarray(jax.device_get(cache.num_seen), np.int64)
    return int(np.sum(seen[:, None, None] - held_tokens(cache)))


def kept_positions(cache: KVCache, *, row: int = 0) -> list[list[np.ndarray]]:
    """The positions that a row holds, ascending: a list of layers of arrays, one a key/value head."""
    return [[np.sort(head[head >= 0]) for head in positions[row]] for positions in _positions(cache)]


def describe_kept(cache: KVCache, *, row: int = 0) -> list[list[str]]:
    """`kept_positions` in short, for reports: "0-3,17,40-171"."""
    return [[_ranges(head) for head in layer] for layer in kept_positions(cache, row=row)]


def _ranges(positions: np.ndarray) -> str:
    """Ascending whole numbers as ranges."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs if len(run))


def _positions(cache: KVCache) -> list[np.ndarray]:
    """Positions of all slots of each layer as each head sees them, `B K S`, -1 where it holds nothing."""
    heads, found = cache.shape.num_kv_heads, []
    for layer in cache.layers:
        exact = np.asarray(jax.device_get(layer.exact.positions))[:, None]
        parts = [np.repeat(exact, heads, axis=1)]
        if layer.body is not None:
            body = np.asarray(jax.device_get(layer.body.positions))
            if layer.body.owners is not None:
                owners = np.asarray(jax.device_get(layer.body.owners))
                body = np.where(owners == np.arange(heads)[None, :, None], body, -1)
            parts.append(np.broadcast_to(body, (*parts[0].shape[:2], body.shape[2])))
        found.append(np.concatenate(parts, axis=2))
    return found


def device_bytes(tree: Any) -> int:
    """Bytes that the buffers of a pytree take on all devices together, as the devices report them."""
    buffers = [shard.data for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(buffer.on_device_size_in_bytes() for buffer in buffers)


def expected_bytes(tree: Any) -> int:
    """What `device_bytes` will say of arrays that are only described yet, without what a device pads."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        shard = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        copies = 1 if leaf.sharding is None else len(leaf.sharding.device_set)
        return copies * math.prod(shard) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def bytes_per_token(
    shape: ModelShape,
    policy: Policy,
    *,
    max_tokens: int,
    placement: Placement = Placement(),
    statistics: Statistics | None = None,
) -> tuple[float, float]:
    """Bytes of a policy's cache of one row over `max_tokens`, before there is one, and those of uncompressed numbers.

    On a mesh that spreads rows, of as many rows as it spreads.

    Raises:
      UserError: the model cannot have the policy.
    """
    rows = 1 if placement.mesh is None else placement.mesh.shape["data"]
    sizes = {"batch": rows, "max_tokens": max_tokens, "placement": placement, "statistics": statistics}
    cache = abstract_cache(shape, policy=policy, **sizes)
    tokens = rows * max_tokens
    return expected_bytes(cache.layers) / tokens, full_cache_bytes(cache) / tokens


def full_cache_bytes(cache: KVCache) -> int:
    """Bytes of `max_tokens` uncompressed keys and values a row, on all devices together, laid out in the same way."""
    shape, batch = cache.shape, cache.num_seen.shape[0]
    sizes = (batch, shape.num_kv_heads, cache.max_tokens, shape.head_size)
    sharding = cache.placement.sharding(KEY_AXES, sizes)
    shard = sizes if sharding is None else sharding.shard_shape(sizes)
    copies = 1 if sharding is None else len(sharding.device_set)
    return 2 * shape.num_layers * copies * math.prod(shard) * jnp.dtype(shape.dtype).itemsize
