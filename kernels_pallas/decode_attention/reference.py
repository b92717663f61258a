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
from jaxtyping import Array, Bool, Float, Int

_BLOCK_ELEMENTS = 1 << 18  # of keys: 1 MiB in float32, about a core's second-level cache
_LEAST_BLOCK_SLOTS = 256  # smaller blocks are ruled by the loop's own cost
_MASKED = -1e30  # finite, so that a row which sees nothing gives exp(0) * 0 and not NaN


def block_slots_for(num_rows: int, num_slots: int, head_size: int) -> int:
    """Slots per block: what gives equal blocks of about `_BLOCK_ELEMENTS` of B * K rows' keys each."""
    wanted = max(_BLOCK_ELEMENTS // (num_rows * head_size), _LEAST_BLOCK_SLOTS)
    num_blocks = max(round(num_slots / wanted), 1)
    return -(-num_slots // num_blocks)


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
    group = num_query_heads // num_kv_heads
    block = block_slots_for(batch * num_kv_heads, num_slots, head_size)
    # The T queries of the G heads that share a key/value head are the rows of one matrix, Q = G T.
    grouped = queries.reshape(batch, num_tokens, num_kv_heads, group, head_size)
    rows = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, group * num_tokens, head_size)
    scaled = rows.astype(jnp.float32) / math.sqrt(head_size)  # B K Q D

    def step(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        # The last block is moved back to end with the segment; the slots that it shares with its neighbour are
        # left to the neighbour.
        start = jnp.minimum(index * block, num_slots - block)
        fresh = (start + jnp.arange(block, dtype=jnp.int32) >= index * block)[None, None]
        block_positions = jax.lax.dynamic_slice_in_dim(key_positions, start, block, axis=1)
        visible = _visible(query_positions, block_positions) & fresh  # B T S
        block_keys = jax.lax.dynamic_slice_in_dim(keys, start, block, axis=2)
        block_values = jax.lax.dynamic_slice_in_dim(values, start, block, axis=2)
        return _attend_block(carry, scaled, block_keys, block_values, jnp.tile(visible, (1, group, 1)))

    zeros = jnp.zeros(scaled.shape, jnp.float32)
    zero = (zeros, jnp.full(scaled.shape[:-1], _MASKED, jnp.float32), zeros[..., 0])
    num_blocks = -(-_live_slots(query_positions, key_positions) // block)
    output, _, total = jax.lax.fori_loop(0, num_blocks, step, zero)
    output = output / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    output = output.reshape(batch, num_kv_heads, group, num_tokens, head_size)
    return jnp.transpose(output, (0, 3, 1, 2, 4)).reshape(queries.shape).astype(queries.dtype)


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
    queries: Float[Array, "B K Q D"],
    keys: Float[Array, "B K S D"],
    values: Float[Array, "B K S D"],
    visible: Bool[Array, "B Q S"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds one block of slots to the running output, maximum and sum."""
    output, maximum, total = carry
    mask = visible[:, None]  # B 1 Q S
    scores = jnp.einsum("BKQD,BKSD->BKQS", queries, keys.astype(jnp.float32))
    scores = jnp.where(mask, scores, _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - new_maximum[..., None]), 0.0)
    # A weight of zero does not silence a NaN: values that no query sees are replaced.
    seen_values = jnp.where(jnp.any(visible, axis=1)[:, None, :, None], values.astype(jnp.float32), 0.0)
    decay = jnp.exp(maximum - new_maximum)
    output = output * decay[..., None] + jnp.einsum("BKQS,BKSD->BKQD", weights, seen_values)
    return output, new_maximum, total * decay + jnp.sum(weights, axis=-1)
