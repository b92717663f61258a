"""The definition of the operation in plain jax.numpy, and its path on CPUs.

The slots of a segment are walked in blocks with a running maximum and a running sum (online softmax, arXiv 1805.02867),
for three reasons. XLA on a CPU would otherwise lay out masked or converted copies of whole segments in memory: on two
cores one contraction over 8,192 slots ran at 3.5 GB/s, blocks of about 1 MiB at 8. Coded keys are decoded block by
block, so no decoded body ever exists. And blocks past the last live slot are never read, so a cache with room for
more tokens than it holds costs nothing.

    rows: the (N / k) T queries that share a stored head are the rows of one matrix, Q

    scores [B N T S] = rows [B k Q R] x keys [B k S R],  masked by positions
    output [B N T R] = weights [B k Q S] x values [B k S R]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.coded import Coded, Parts, alignment, read_parts, slice_parts

_BLOCK_ELEMENTS = 1 << 18  # of keys: 1 MiB in float32, about a core's second-level cache
_LEAST_BLOCK_SLOTS = 256  # smaller blocks are ruled by the loop's own cost
_MASKED = -1e30  # finite, so that a row which sees nothing gives exp(0) * 0 and not NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Slots of a cache, and the queries as these slots want them.

    Attributes:
      queries: `B T N R`, rotated; R is the width of the keys as they are stored.
      keys: parts of `B k S R`, k a divisor of N; query head n reads head n // (N / k).
      values: parts of `B k S R`, k and R of their own.
      positions: `B K S` int32, or `B 1 S` where all heads hold the same tokens; -1 is an empty slot. The order of
        slots is free.
      bias: `B T N`, added to a query's products with all keys of this segment, or None.
    """

    queries: Any
    keys: Parts
    values: Parts
    positions: Any
    bias: Any = None

    @classmethod
    def of_arrays(
        cls,
        queries: Float[Array, "B T N D"],
        keys: Float[Array, "B K S D"],
        *,
        values: Float[Array, "B K S D"],
        positions: Int[Array, "B S"],
    ) -> "Segment":
        """A segment of plain keys and values, its tokens the same for all heads."""
        return cls(
            queries=queries,
            keys=(Coded(planes=(keys,)),),
            values=(Coded(planes=(values,)),),
            positions=positions[:, None],
        )


@dataclasses.dataclass(frozen=True)
class Attended:
    """What a segment gave.

    Attributes:
      output: `B T N R` float32, the sum of the segment's values, each times its weight.
      weight: `B T N` float32, the sum of these weights: 0 to 1, and 1 over all segments.
    """

    output: Any
    weight: Any


Running = tuple[Float[Array, "B N T R"], Float[Array, "B N T"], Float[Array, "B N T"]]
"""Unscaled output, maximum and sum of weights of the blocks so far."""


def block_slots_for(num_rows: int, num_slots: int, head_size: int, *, multiple: int = 1) -> int:
    """Slots per block: what gives equal blocks of about `_BLOCK_ELEMENTS` of B * K rows' keys each."""
    wanted = max(_BLOCK_ELEMENTS // (num_rows * head_size), _LEAST_BLOCK_SLOTS)
    num_blocks = max(round(num_slots / wanted), 1)
    block = -(-num_slots // num_blocks)
    return min(-(-block // multiple) * multiple, num_slots)


def decode_attention(
    segments: tuple[Segment, ...], *, query_positions: Int[Array, "B T"], scale: float
) -> tuple[Attended, ...]:
    """See `api.decode_attention`."""
    walked = [_walk(segment, query_positions, scale) for segment in segments]
    maximum = walked[0][1]
    for _, other, _ in walked[1:]:
        maximum = jnp.maximum(maximum, other)
    decays = [jnp.exp(own - maximum) for _, own, _ in walked]  # B N T
    total = sum(sums * decay for (_, _, sums), decay in zip(walked, decays, strict=True))
    outputs = []
    for (output, _, sums), decay in zip(walked, decays, strict=True):
        share = decay / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        weighted = jnp.swapaxes(output * share[..., None], 1, 2)
        outputs.append(Attended(weighted, jnp.swapaxes(sums * share, 1, 2)))
    return tuple(outputs)


def _walk(segment: Segment, query_positions: Int[Array, "B T"], scale: float) -> Running:
    """Attention over one segment, block by block."""
    num_slots = segment.positions.shape[2]
    batch, num_tokens, num_heads = segment.queries.shape[:3]
    queries = jnp.swapaxes(segment.queries.astype(jnp.float32), 1, 2) * scale  # B N T R
    bias = None if segment.bias is None else jnp.swapaxes(segment.bias, 1, 2)[..., None] * scale  # B N T 1
    stored = max(part.num_heads for part in segment.keys)
    multiple = max(alignment(segment.keys), alignment(segment.values))
    block = block_slots_for(batch * stored, num_slots, queries.shape[3], multiple=multiple)

    def step(index: jax.Array, carry: Running) -> Running:
        # The last block is moved back to end with the segment; the slots that it shares with its neighbour are
        # left to the neighbour.
        start = jnp.minimum(index * block, num_slots - block)
        fresh = (start + jnp.arange(block, dtype=jnp.int32) >= index * block)[None, None, None]
        positions = jax.lax.dynamic_slice_in_dim(segment.positions, start, block, axis=2)
        visible = _visible(query_positions, positions) & fresh
        keys = read_parts(slice_parts(segment.keys, start, block), positions)
        scores = _products(queries, keys)
        scores = scores if bias is None else scores + bias
        return _add_block(carry, scores, slice_parts(segment.values, start, block), positions, visible)

    width = jax.eval_shape(lambda: read_parts(segment.values, segment.positions)).shape[3]
    zeros = jnp.zeros((batch, num_heads, num_tokens, width), jnp.float32)
    zero = (zeros, jnp.full(zeros.shape[:-1], _MASKED, jnp.float32), jnp.zeros(zeros.shape[:-1], jnp.float32))
    num_blocks = -(-_live_slots(query_positions, segment.positions) // block)
    return jax.lax.fori_loop(0, num_blocks, step, zero)


def _products(queries: Float[Array, "B N T R"], keys: Float[Array, "B k S R"]) -> Float[Array, "B N T S"]:
    """Products of each query with the keys of its stored head."""
    batch, num_heads, num_tokens, width = queries.shape
    rows = queries.reshape(batch, keys.shape[1], -1, width)
    products = jnp.einsum("BkQR,BkSR->BkQS", rows, keys)
    return products.reshape(batch, num_heads, num_tokens, keys.shape[2])


def _visible(query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"]) -> Bool[Array, "B #K T S"]:
    """Which slot each query may see."""
    key, query = positions[:, :, None, :], query_positions[:, None, :, None]
    return (key >= 0) & (key <= query)


def _live_slots(query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"]) -> Int[Array, ""]:
    """One past the last slot that any query of any row sees."""
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    seen = (positions >= 0) & (positions <= newest)
    slots = jnp.arange(positions.shape[2], dtype=jnp.int32)[None, None, :]
    return jnp.max(jnp.where(seen, slots + 1, 0))


def _of_heads(array: jax.Array, num_heads: int) -> jax.Array:
    """An array of one head for all, or of fewer heads, repeated to `num_heads` along axis 1."""
    return jnp.repeat(array, num_heads // array.shape[1], axis=1)


def _add_block(
    carry: Running,
    scores: Float[Array, "B N T S"],
    values: Parts,
    positions: Int[Array, "B #K S"],
    visible: Bool[Array, "B #K T S"],
) -> Running:
    """Adds one block of slots to the running output, maximum and sum."""
    output, maximum, total = carry
    batch, num_heads, num_tokens, num_slots = scores.shape
    numbers = read_parts(values, positions)  # B k S R
    num_stored = numbers.shape[1]
    mask = _of_heads(visible, num_heads)
    scores = jnp.where(mask, scores, _MASKED)
    new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
    weights = jnp.where(mask, jnp.exp(scores - new_maximum[..., None]), 0.0)
    # A weight of zero does not silence a NaN: values that no query sees are replaced.
    seen = jnp.any(visible, axis=2)  # B K S
    if seen.shape[1] > num_stored:
        seen = jnp.any(seen.reshape(batch, num_stored, -1, num_slots), axis=2)
    numbers = jnp.where(seen[..., None], numbers, 0.0)
    rows = weights.reshape(batch, num_stored, -1, num_slots)
    added = jnp.einsum("BkQS,BkSR->BkQR", rows, numbers).reshape(output.shape)
    decay = jnp.exp(maximum - new_maximum)
    return output * decay[..., None] + added, new_maximum, total * decay + jnp.sum(weights, axis=-1)
