"""Attention over a cache: the new tokens are written, then read together with what is kept.

Three phases of one formula. `causal_attention` is a plain pass without a cache (training, and the prompt itself);
`prefill_layer` runs it over a prompt and stores the prompt's keys and values; `decode_layer` appends a few tokens and
attends over exact segment and body with one softmax. Positions alone say who may see whom.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kvjax import axes
from kvjax._kernels import Segment, decode_attention
from kvjax.cache import ExactSegment, LayerCache
from kvjax.rounds import append, fill
from kvjax.sharding import Placement
from kvjax.statistics import LayerStatistics, observe

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
    num_tokens = queries.shape[1]
    if num_tokens <= _PLAIN_TOKENS:
        return _plain_attention(queries, keys, values=values, positions=positions)
    cached_keys, cached_values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # B K T D
    padding = -num_tokens % _QUERY_BLOCK
    padded = jnp.pad(queries, ((0, 0), (0, padding), (0, 0), (0, 0)))
    padded_positions = jnp.pad(positions, ((0, 0), (0, padding)), constant_values=axes.EMPTY)

    def attend(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        block_queries, block_positions = block
        segment = Segment.of_arrays(block_queries, cached_keys, values=cached_values, positions=positions)
        scale = 1.0 / math.sqrt(queries.shape[-1])
        (attended,) = decode_attention((segment,), query_positions=block_positions, scale=scale)
        return attended.output.astype(queries.dtype)

    blocks = jax.lax.map(attend, (_split_tokens(padded), _split_tokens(padded_positions)))
    return jnp.moveaxis(blocks, 0, 1).reshape(padded.shape)[:, :num_tokens]


def _split_tokens(array: jax.Array) -> jax.Array:
    """`B T ...` -> `blocks B _QUERY_BLOCK ...`."""
    batch, num_tokens = array.shape[:2]
    blocks = array.reshape(batch, num_tokens // _QUERY_BLOCK, _QUERY_BLOCK, *array.shape[2:])
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


def prefill_layer(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> tuple[axes.Queries, LayerCache]:
    """Attention of a prompt over itself, uncompressed, and the empty layer filled with it.

    Args:
      layer: an empty layer.
      queries: `B T N D`, rotated.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`: 0, 1, ..., then -1 past a row's length.
      placement: where the arrays live.
    """
    output = causal_attention(queries, keys, values=values, positions=positions)
    return output, fill(layer, queries, keys=keys, values=values, positions=positions, placement=placement)


def decode_layer(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> tuple[axes.Queries, LayerCache]:
    """Appends new tokens to a layer that has room and attends over all that it holds; arguments as above."""
    exact = append(layer.exact, keys, values=values, positions=positions, placement=placement)
    layer = dataclasses.replace(layer, exact=exact)
    return attend(layer, queries, positions=positions), layer


def attend(layer: LayerCache, queries: axes.Queries, *, positions: axes.Positions) -> axes.Queries:
    """Attention of queries over all that a layer holds, one softmax over exact segment and body.

    Args:
      layer: the layer.
      queries: `B T N D`, rotated.
      positions: `B T`, theirs; -1 is padding.
    """
    scale = 1.0 / math.sqrt(queries.shape[-1])
    segments = (_exact_segment(layer.exact, queries), *_body_segments(layer, queries))
    attended = decode_attention(segments, query_positions=positions, scale=scale)
    output = attended[0].output
    if layer.body is not None:
        codec, arrays = layer.body.codecs[1], layer.body.arrays(1)
        output = output + codec.finish_output(attended[1].output, attended[1].weight, arrays)
    return output.astype(queries.dtype)


def _exact_segment(exact: ExactSegment, queries: axes.Queries) -> Segment:
    return Segment.of_arrays(queries, exact.keys, values=exact.values, positions=exact.positions)


def _body_segments(layer: LayerCache, queries: axes.Queries) -> tuple[Segment, ...]:
    """The body with the queries as its keys want them; nothing where there is no body."""
    body = layer.body
    if body is None:
        return ()
    key_codec, value_codec = body.codecs
    prepared, bias = key_codec.prepare_query(queries, body.arrays(0))
    return (
        Segment(
            queries=prepared,
            keys=key_codec.readable(body.keys, body.arrays(0)),
            values=value_codec.readable(body.values, body.arrays(1)),
            positions=body.positions,
            bias=bias,
        ),
    )


def observe_layer(
    layer: LayerStatistics,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> tuple[axes.Queries, LayerStatistics]:
    """A plain causal pass that counts its queries, keys and values into statistics."""
    del placement
    output = causal_attention(queries, keys, values=values, positions=positions)
    return output, observe(layer, queries, keys=keys, values=values, positions=positions)
