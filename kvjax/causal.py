"""Causal attention of tokens among themselves, without a cache: training, calibration, and the prompt itself."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax import axes
from kvjax._kernels import Segment, decode_attention

_PLAIN_TOKENS = 1024  # up to here the blocks of queries are unrolled, and can be differentiated
_PLAIN_QUERY_BLOCK = 256
_QUERY_BLOCK = 512
_MASKED = -1e30


def causal_attention(
    queries: axes.Queries, keys: axes.NewKeys, *, values: axes.NewValues, positions: axes.Positions
) -> axes.Queries:
    """Attention of tokens among themselves; each sees those at its own position and before.

    No T x T matrix is laid out. Up to 1,024 tokens, each 256 queries attend over the keys before their end, at half
    the work of a masked square; beyond, 512 queries at a time walk the keys in blocks.

    Args:
      queries: `B T N D`, rotated.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`, ascending along T; -1, on the right, is padding: nobody sees it, and what it gets is
        finite and means nothing.

    Returns:
      `B T N D` in the dtype of the queries.
    """
    if queries.shape[1] <= _PLAIN_TOKENS:
        return _plain_attention(queries, keys, values=values, positions=positions)
    return _by_blocks(queries, keys, values=values, positions=positions, mass=None)[0]


def attention_with_mass(
    queries: axes.Queries, keys: axes.NewKeys, *, values: axes.NewValues, positions: axes.Positions, mass: str
) -> tuple[axes.Queries, Float[Array, "B K T"]]:
    """`causal_attention`, and what the weights of each token come to; still without a T x T matrix.

    Args:
      queries: `B T N D`, rotated.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`, as above.
      mass: what is asked for (`kernels_pallas/decode_attention`).
    """
    output, masses = _by_blocks(queries, keys, values=values, positions=positions, mass=mass)
    return output, masses


def _by_blocks(
    queries: axes.Queries, keys: axes.NewKeys, *, values: axes.NewValues, positions: axes.Positions, mass: str | None
) -> tuple[axes.Queries, Float[Array, "B K T"]]:
    """Blocks of queries, each walking the keys in blocks."""
    num_tokens = queries.shape[1]
    cached_keys, cached_values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # B K T D
    padding = -num_tokens % _QUERY_BLOCK if num_tokens > _QUERY_BLOCK else 0
    padded = jnp.pad(queries, ((0, 0), (0, padding), (0, 0), (0, 0)))
    padded_positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=axes.EMPTY)

    def attend(masses: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block_queries, block_positions = block
        segment = Segment.of_arrays(block_queries, cached_keys, values=cached_values, positions=positions)
        scale = 1.0 / math.sqrt(queries.shape[-1])
        (attended,) = decode_attention((segment,), query_positions=block_positions, scale=scale, mass=mass)
        if mass is not None:
            masses = add_mass(mass, masses, attended.mass)
        return masses, attended.output.astype(queries.dtype)

    none_yet = jnp.zeros((keys.shape[0], keys.shape[2], num_tokens), jnp.float32)
    masses, blocks = jax.lax.scan(attend, none_yet, (_split_tokens(padded), _split_tokens(padded_positions)))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded.shape)[:, :num_tokens], masses


def add_mass(mass: str, old: Float[Array, "B K S"], new: Float[Array, "B K S"]) -> Float[Array, "B K S"]:
    """Masses of earlier queries and of later ones together."""
    return jnp.maximum(old, new) if mass == "peak" else old + new


def _split_tokens(array: jax.Array) -> jax.Array:
    """`B T ...` -> `blocks B _QUERY_BLOCK ...`."""
    batch, num_tokens = array.shape[:2]
    size = min(_QUERY_BLOCK, num_tokens)
    blocks = array.reshape(batch, num_tokens // size, size, *array.shape[2:])
    return jnp.moveaxis(blocks, 1, 0)


def _plain_attention(
    queries: axes.Queries, keys: axes.NewKeys, *, values: axes.NewValues, positions: axes.Positions
) -> axes.Queries:
    """Attention by unrolled blocks of queries, each over the keys up to its own end."""
    num_tokens = queries.shape[1]
    outputs = []
    for start in range(0, num_tokens, _PLAIN_QUERY_BLOCK):
        end = min(start + _PLAIN_QUERY_BLOCK, num_tokens)
        query, key = positions[:, start:end, None], positions[:, None, :end]
        bias = jnp.where((key >= 0) & (key <= query), 0.0, _MASKED)
        outputs.append(_attend_block(queries[:, start:end], keys[:, :end], values[:, :end], bias))
    return jnp.concatenate(outputs, axis=1)


def _attend_block(queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention of `B T N D` over `B S K D` with a bias `B T S`, scores and sums in float32."""
    batch, num_tokens, _, head_size = queries.shape
    num_kv_heads, num_keys = keys.shape[2], keys.shape[1]
    grouped = queries.reshape(batch, num_tokens, num_kv_heads, -1, head_size)
    # The G query heads of a key/value head become rows of one matrix product, Q = G T.
    rows = jnp.transpose(grouped, (0, 2, 3, 1, 4)).reshape(batch, num_kv_heads, -1, head_size)  # B K Q D
    scores = jnp.einsum("BKQD,BSKD->BKQS", rows, keys, preferred_element_type=jnp.float32) / math.sqrt(head_size)
    shape = scores.shape
    scores = scores.reshape(batch, num_kv_heads, -1, num_tokens, num_keys) + bias[:, None, None]
    scores = scores.reshape(shape)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum("BKQS,BSKD->BKQD", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    output = (output / total).reshape(batch, num_kv_heads, -1, num_tokens, head_size)  # B K G T D
    return jnp.transpose(output, (0, 3, 1, 2, 4)).reshape(queries.shape).astype(queries.dtype)
