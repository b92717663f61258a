"""The definition of the operation in plain jax.numpy, and its path on CPUs.

The slots of a segment are walked in blocks with a running maximum and a running sum (online softmax, arXiv 1805.02867),
for three reasons. XLA on a CPU would otherwise lay out masked or converted copies of whole segments in memory: on two
cores one contraction over 8,192 slots ran at 3.5 GB/s, blocks of about 1 MiB at 8. Coded keys are decoded block by
block, so no decoded body ever exists. And blocks past the last live slot are never read, so a cache with room for
more tokens than it holds costs nothing. What the weights of a slot add up to is known only when all blocks are seen: it
takes a second walk, and only if asked for.

    rows: the (N / k) T queries that share a stored head are the rows of one matrix, Q

    scores [B N T S] = rows [B k Q R] x keys [B k S R],  masked by positions
    output [B N T R] = weights [B k Q S] x values [B k S R]
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.coded import Coded, Parts, alignment, read_parts, slice_parts
from kernels_pallas.slots.reference import take_slots

_BLOCK_ELEMENTS = 1 << 18  # of keys: 1 MiB in float32, about a core's second-level cache
_LEAST_BLOCK_SLOTS = 256  # smaller blocks are ruled by the loop's own cost
_MASKED = -1e30  # finite, so that a row which sees nothing gives exp(0) * 0 and not NaN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Slots of a cache, and the queries as these slots want them.

    Attributes:
      queries: `B T N R`, rotated; R is the width of the keys as they are stored.
      keys: parts of `B k S R`, k a divisor of N; query head n reads head n // (N / k). Of more slots with `pages`.
      values: parts of `B k S R`, k and R of their own; none where masses alone are asked for.
      positions: `B K S` int32, or `B 1 S` where all heads hold the same tokens; -1 is an empty slot. The order of
        slots is free.
      bias: `B T N`, added to a query's products with all keys of this segment, or None.
      owners: `B 1 S` int32 where heads share one pool of slots (k and K are then 1): the key/value head, of
        `num_kv_heads`, that alone sees a slot. None where each head has slots of its own.
      num_kv_heads: K of the model; N / K query heads belong to one.
      pages: `B k count` int32, or None: the pages of the stored keys and values that are read, in any order. These are
        the S = count * page slots of all else: slot s is stored at place s % page of page `pages[s // page]`. Negative
        is no page, and its slots are empty: their positions are -1.
      page: neighbouring slots of a page; 0 without pages.
    """

    queries: Any
    keys: Parts
    values: Parts
    positions: Any
    bias: Any = None
    owners: Any = None
    num_kv_heads: int | None = None
    pages: Any = None
    page: int = 0

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
            num_kv_heads=keys.shape[1],
        )


@dataclasses.dataclass(frozen=True)
class Attended:
    """What a segment gave.

    Attributes:
      output: `B T N R` float32, the sum of the segment's values, each times its weight.
      weight: `B T N` float32, the sum of these weights: 0 to 1, and 1 over all segments.
      mass: what the queries' weights of each slot come to, `B K S` float32 (`B 1 S` in a pool), or None.
    """

    output: Any
    weight: Any
    mass: Any = None


MASSES = ("sum", "peak", "low")
"""What may be asked of a slot's weights, over the T tokens and the G query heads of its key/value head: their sum over
tokens and mean over heads; the largest; how many tokens gave it less than 1 / (slots they saw), mean over heads."""


Running = tuple[Float[Array, "B N T R"], Float[Array, "B N T"], Float[Array, "B N T"]]
"""Unscaled output, maximum and sum of weights of the blocks so far."""


def block_slots_for(num_rows: int, num_slots: int, head_size: int, *, multiple: int = 1) -> int:
    """Slots per block: what gives equal blocks of about `_BLOCK_ELEMENTS` of B * K rows' keys each."""
    wanted = max(_BLOCK_ELEMENTS // (num_rows * head_size), _LEAST_BLOCK_SLOTS)
    num_blocks = max(round(num_slots / wanted), 1)
    block = -(-num_slots // num_blocks)
    return min(-(-block // multiple) * multiple, num_slots)


def decode_attention(
    segments: tuple[Segment, ...],
    *,
    query_positions: Int[Array, "B T"],
    scale: float,
    mass: str | None = None,
    walks: tuple[Callable[..., Running], ...] = (),
    masses: tuple[Callable[..., jax.Array], ...] = (),
) -> tuple[Attended, ...]:
    """See `api.decode_attention`; `walks` and `masses` implement `walk` and `mass_of` in other ways, one a segment."""
    walks, masses = walks or (walk,) * len(segments), masses or (mass_of,) * len(segments)
    walked = [one(segment, query_positions, scale) for one, segment in zip(walks, segments, strict=True)]
    maximum = functools.reduce(jnp.maximum, [own for _, own, _ in walked])
    decays = [jnp.exp(own - maximum) for _, own, _ in walked]  # B N T
    total = sum(sums * decay for (_, _, sums), decay in zip(walked, decays, strict=True))
    outputs = []
    for (output, _, sums), decay in zip(walked, decays, strict=True):
        share = decay / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        weighted = jnp.swapaxes(output * share[..., None], 1, 2)
        outputs.append(Attended(weighted, jnp.swapaxes(sums * share, 1, 2)))
    if mass is None:
        return tuple(outputs)
    seen = sum(jnp.sum(_visible(segment, query_positions, segment.positions), axis=3) for segment in segments)  # B #K T
    totals = Totals(maximum, total, _of_heads(seen, total.shape[1]))
    return tuple(
        dataclasses.replace(attended, mass=one(segment, query_positions, scale, totals, mass))
        for attended, one, segment in zip(outputs, masses, segments, strict=True)
    )


def without_pages(segment: Segment) -> Segment:
    """The same segment with its pages cut out and laid beside each other.

    All at once: taken block by block, XLA would on a CPU lay out all that is stored in bfloat16 as float32 each time.
    """
    if segment.pages is None:
        return segment
    keys, values = (take_slots(parts, segment.pages, unit=segment.page) for parts in (segment.keys, segment.values))
    return dataclasses.replace(segment, keys=keys, values=values, pages=None, page=0)


class _Blocks:
    """A segment's slots in blocks, with the scores of all queries in each."""

    def __init__(self, segment: Segment, query_positions: Int[Array, "B T"], scale: float):
        self.segment, self._query_positions = segment, query_positions
        self.num_slots = segment.positions.shape[2]
        self._queries = jnp.swapaxes(segment.queries.astype(jnp.float32), 1, 2) * scale  # B N T R
        self._bias = None if segment.bias is None else jnp.swapaxes(segment.bias, 1, 2)[..., None] * scale  # B N T 1
        stored = max(part.num_heads for part in segment.keys)
        rows, multiple = segment.queries.shape[0] * stored, max(alignment(segment.keys), alignment(segment.values))
        self.size = block_slots_for(rows, self.num_slots, self._queries.shape[3], multiple=multiple)
        self.count = -(-jnp.max(live_slots(query_positions, segment.positions)) // self.size)

    def start(self, index: jax.Array) -> jax.Array:
        """The first slot; the last block is moved back to end with the segment."""
        return jnp.minimum(index * self.size, self.num_slots - self.size)

    def fresh(self, index: jax.Array) -> Bool[Array, "S"]:
        """Slots of a block but those that the last one shares with its neighbour: they are left to the neighbour."""
        return self.start(index) + jnp.arange(self.size, dtype=jnp.int32) >= index * self.size

    def scores(self, index: jax.Array) -> tuple[Float[Array, "B N T S"], Bool[Array, "B #K T S"], jax.Array]:
        """Scores, which of them count, and the positions of a block's slots."""
        start = self.start(index)
        positions = jax.lax.dynamic_slice_in_dim(self.segment.positions, start, self.size, axis=2)
        owners = self.segment.owners
        owners = None if owners is None else jax.lax.dynamic_slice_in_dim(owners, start, self.size, axis=2)
        visible = _visible(dataclasses.replace(self.segment, owners=owners), self._query_positions, positions)
        keys = read_parts(slice_parts(self.segment.keys, start, self.size), positions)
        scores = _products(self._queries, keys)
        scores = scores if self._bias is None else scores + self._bias
        return scores, visible & self.fresh(index)[None, None, None], positions


def walk(segment: Segment, query_positions: Int[Array, "B T"], scale: float) -> Running:
    """Attention over one segment, block by block: output, maximum and sum of weights, not divided by anything yet."""
    segment = without_pages(segment)
    batch, num_tokens, num_heads = segment.queries.shape[:3]
    blocks = _Blocks(segment, query_positions, scale)

    def step(index: jax.Array, carry: Running) -> Running:
        scores, visible, positions = blocks.scores(index)
        values = slice_parts(segment.values, blocks.start(index), blocks.size)
        return _add_block(carry, scores, values, positions, visible)

    width = jax.eval_shape(lambda: read_parts(segment.values, segment.positions)).shape[3] if segment.values else 0
    zeros = jnp.zeros((batch, num_heads, num_tokens, width), jnp.float32)
    zero = (zeros, jnp.full(zeros.shape[:-1], _MASKED, jnp.float32), jnp.zeros(zeros.shape[:-1], jnp.float32))
    return jax.lax.fori_loop(0, blocks.count, step, zero)


@dataclasses.dataclass(frozen=True)
class Totals:
    """Over all segments, `B N T`: the largest score, the sum of weights beside it, and the slots that were seen."""

    maximum: Any
    total: Any
    seen: Any

    @property
    def level(self) -> Float[Array, "B N T"]:
        """The natural logarithm of what a query's weights come to; 0 where it sees nothing."""
        return jnp.where(self.total > 0, self.maximum + jnp.log(self.total), 0.0)

    @property
    def uniform(self) -> Float[Array, "B N T"]:
        """Just below 1 / slots that a query sees: a share that rounding alone takes below that is not less."""
        return (1 - 1e-5) / jnp.maximum(self.seen, 1).astype(jnp.float32)


def mass_of(
    segment: Segment, query_positions: Int[Array, "B T"], scale: float, totals: Totals, mass: str
) -> Float[Array, "B K S"]:
    """What the weights of each slot come to, one of `MASSES`: a second walk over the keys."""
    segment = without_pages(segment)
    blocks = _Blocks(segment, query_positions, scale)
    batch, num_kv_heads = segment.queries.shape[0], segment.num_kv_heads
    group = segment.queries.shape[2] // num_kv_heads
    uniform = 1.0 / jnp.maximum(totals.seen, 1)[..., None].astype(jnp.float32)

    def step(index: jax.Array, masses: jax.Array) -> jax.Array:
        scores, visible, _ = blocks.scores(index)
        mask = _of_heads(visible, scores.shape[1])
        shares = jnp.exp(scores - totals.maximum[..., None]) / totals.total[..., None]
        if mass == "low":
            shares = (shares < uniform).astype(jnp.float32)
        shares = jnp.where(mask, shares, 0.0)
        by_head = shares.reshape(batch, num_kv_heads, -1, shares.shape[3])  # B K GT S
        new = jnp.max(by_head, axis=2) if mass == "peak" else jnp.sum(by_head, axis=2) / group
        if segment.owners is not None:  # of the others, none sees the slot
            new = jnp.sum(new, axis=1, keepdims=True)
        start = blocks.start(index)
        old = jax.lax.dynamic_slice_in_dim(masses, start, blocks.size, axis=2)
        new = jnp.where(blocks.fresh(index)[None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(masses, new, start, axis=2)

    heads = num_kv_heads if segment.owners is None else 1
    return jax.lax.fori_loop(0, blocks.count, step, jnp.zeros((batch, heads, blocks.num_slots), jnp.float32))


def _products(queries: Float[Array, "B N T R"], keys: Float[Array, "B k S R"]) -> Float[Array, "B N T S"]:
    """Products of each query with the keys of its stored head."""
    batch, num_heads, num_tokens, width = queries.shape
    rows = queries.reshape(batch, keys.shape[1], -1, width)
    products = jnp.einsum("BkQR,BkSR->BkQS", rows, keys)
    return products.reshape(batch, num_heads, num_tokens, keys.shape[2])


def _visible(
    segment: Segment, query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"]
) -> Bool[Array, "B #K T S"]:
    """Which slot each query of each key/value head may see."""
    key, query = positions[:, :, None, :], query_positions[:, None, :, None]
    visible = (key >= 0) & (key <= query)
    if segment.owners is None:
        return visible
    heads = jnp.arange(segment.num_kv_heads, dtype=jnp.int32)[None, :, None, None]
    return visible & (segment.owners[:, :, None, :] == heads)


def live_slots(query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"]) -> Int[Array, "B"]:
    """One past the last slot of each row that any of its queries sees."""
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    seen = (positions >= 0) & (positions <= newest)
    slots = jnp.arange(positions.shape[2], dtype=jnp.int32)[None, None, :]
    return jnp.max(jnp.where(seen, slots + 1, 0), axis=(1, 2))


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
    # B k S R
    numbers = read_parts(values, positions) if values else jnp.zeros((batch, 1, num_slots, 0), jnp.float32)
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
