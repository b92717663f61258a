"""The definition of the operation in plain jax.numpy, and its path on CPUs.

    out[t, n] = sum_s softmax_s(q[t, n] . k[s] / sqrt(D)) v[s]    over the slots s that query t may see

The slots are walked in blocks with a running maximum and a running sum (online softmax, arXiv 1805.02867), for two
reasons. XLA on a CPU would otherwise lay out masked or converted copies of whole segments in memory: on two cores one
contraction over 8,192 slots ran at 3.5 GB/s, blocks of about 1 MiB at 8. And blocks past the last live slot are
never read, so a cache with room for more tokens than it holds costs nothing.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK_ELEMENTS = 1 << 18  # of keys: 1 MiB in float32, about a core's second-level cache
_LEAST_BLOCK_SLOTS = 256  # smaller blocks are ruled by the loop's own cost
_MASKED = -1e30  # finite, so that a row which sees nothing gives exp(0) * 0 and not NaN


def block_slots_for(num_rows: int, num_slots: int, head_size: int) -> int:
    """Slots per block: a power of two that puts about `_BLOCK_ELEMENTS` of B * K rows' keys into one block."""
    wanted = max(_BLOCK_ELEMENTS // (num_rows * head_size), _LEAST_BLOCK_SLOTS)
    return min(1 << (wanted.bit_length() - 1), num_slots)


def decode_attention(
    queries: Float[Array, "B T N D"],
    keys: Float[Array, "B K S D"],
    *,
    values: Float[Array, "B K S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
) -> Float[Array, "B T N D"]:
    """See `api.decode_attention`."""
    batch, num_tokens, num_query_heads, head_size = queries.shape
    num_kv_heads, num_slots = keys.shape[1:3]
    block = block_slots_for(batch * num_kv_heads, num_slots, head_size)
    grouped = queries.reshape(batch, num_tokens, num_kv_heads, -1, head_size)  # B T K G D
    scaled = jnp.moveaxis(grouped, 1, 3).astype(jnp.float32) / math.sqrt(head_size)  # B K G T D

    def step(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        # The last block is moved back to end with the segment; the slots that it shares with its neighbour are
        # left to the neighbour.
        start = jnp.minimum(index * block, num_slots - block)
        fresh = (start + jnp.arange(block, dtype=jnp.int32) >= index * block)[None, None]
        block_positions = jax.lax.dynamic_slice_in_dim(key_positions, start, block, axis=1)
        visible = _visible(query_positions, block_positions) & fresh  # B T S
        block_keys = jax.lax.dynamic_slice_in_dim(keys, start, block, axis=2)
        block_values = jax.lax.dynamic_slice_in_dim(values, start, block, axis=2)
        return _attend_block(carry, scaled, block_keys, block_values, visible)

    rows = scaled.shape[:-1]  # B K G T
    zero = (jnp.zeros(scaled.shape, jnp.float32), jnp.full(rows, _MASKED, jnp.float32), jnp.zeros(rows, jnp.float32))
    num_blocks = -(-_live_slots(query_positions, key_positions) // block)
    output, _, total = jax.lax.fori_loop(0, num_blocks, step, zero)
    output = output / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(output, 3, 1).reshape(queries.shape).astype(queries.dtype)


def _visible(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """Which slot each query may see, `B T S`."""
    key, query = key_positions[:, None, :], query_positions[:, :, None]
    return (key >= 0) & (key <= query)


def _live_slots(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """One past the last slot that any query of any row sees."""
    newest = jnp.max(query_positions, axis=1, keepdims=True)  # B 1
    seen = (key_positions >= 0) & (key_positions <= newest)
    slots = jnp.arange(key_positions.shape[1], dtype=jnp.int32)[None, :]
    return jnp.max(jnp.where(seen, slots + 1, 0))


def _attend_block(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    queries: Float[Array, "B K G T D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    visible: Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds one block of slots to the running output, maximum and sum."""
    output, maximum, total = carry
    mask = visible[:, None, None]  # B 1 1 T S
    scores = jnp.einsum("BKGTD,BKSD->BKGTS", queries, keys.astype(jnp.float32))
    scores = jnp.where(mask, scores, _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - new_maximum[..., None]), 0.0)
    # A weight of zero does not silence a NaN: values that no query sees are replaced.
    seen_values = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], values.astype(jnp.float32), 0.0)
    decay = jnp.exp(maximum - new_maximum)
    output = output * decay[..., None] + jnp.einsum("BKGTS,BKSD->BKGTD", weights, seen_values)
    return output, new_maximum, total * decay + jnp.sum(weights, axis=-1)
