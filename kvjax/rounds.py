"""How tokens move: into the exact segment, and from there, a round at a time, into the body.

    sinks        ring of W + U slots, the newest tokens               body
    [0 1 2 3]    [132 133 ... 4 + W + U - 1 | 128 129 130 131]        [4 5 6 ... 127 | - - -]
                                              U oldest  ---- round ---------------->

A round comes due when the ring is full and one more token wants in: before that token is written, the ring's U oldest
tokens are encoded and appended to the body, and the W newest stay exact. Which tokens are exact at any moment depends
on positions alone, never on how the tokens arrived, so a token sees the same cache whether it comes alone or in a
chunk.

Rounds come first in a step, before anything reads the body: then XLA updates bodies in place. A round at the end of a
step, after attention has read them, cost a copy of every body on CPUs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax import axes
from kvjax.cache import KEY_AXES, Body, ExactSegment, KVCache, LayerCache, place_heads
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays

QUERY_WINDOW = 32
"""Last queries of a prompt that codecs may look at when they choose."""

_FILL_SLOTS = 1024  # of a prompt that are encoded together


def new_positions(cache: KVCache, lengths: Int[Array, "B"], num_tokens: int) -> axes.Positions:
    """Positions of the next `num_tokens` tokens of each row; -1 past a row's length (padding on the right)."""
    offsets = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    return jnp.where(offsets < lengths[:, None], cache.num_seen[:, None] + offsets, axes.EMPTY)


def room(cache: KVCache) -> Int[Array, "B"]:
    """Tokens that each row takes before its next round; the whole ring where there is no body."""
    layer = cache.layers[0]
    if layer.body is None:
        return jnp.full(cache.num_seen.shape, layer.exact.num_slots, jnp.int32)
    ring = layer.exact.positions[:, layer.exact.num_sinks :]
    sinks_left = jnp.maximum(layer.exact.num_sinks - cache.num_seen, 0)
    return jnp.sum(ring < 0, axis=1).astype(jnp.int32) + sinks_left


def make_room(cache: KVCache, wanted: Bool[Array, "B"]) -> KVCache:
    """Runs a round in each row whose ring is full.

    Args:
      cache: the cache.
      wanted: rows that are about to get a token; the others stay as they are.
    """
    if cache.layers[0].body is None:
        return cache
    due = (room(cache) == 0) & wanted

    def run(layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        return tuple(_round(layer, due, placement=cache.placement) for layer in layers)

    layers = jax.lax.cond(jnp.any(due), run, lambda layers: layers, cache.layers)
    return dataclasses.replace(cache, layers=layers)


def append(
    segment: ExactSegment,
    keys: axes.NewKeys,
    *,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> ExactSegment:
    """Writes new tokens over the oldest slots of the ring; tokens at position -1 are written nowhere.

    Args:
      segment: the sinks and the ring.
      keys: `B T K D`, T at most the ring's slots, already rotated.
      values: `B T K D`.
      positions: `B T`.
      placement: where the arrays live.
    """
    slots = jnp.where(positions >= 0, slot_of(segment, positions), segment.num_slots)  # S lies outside: dropped
    rows = jnp.arange(positions.shape[0], dtype=jnp.int32)[:, None]

    def write(cached: jax.Array, new: jax.Array) -> jax.Array:
        # Index arrays around a slice put their axes first: the updates are `B T K D`, as activations are.
        return placement.constrain(cached.at[rows, :, slots].set(new, mode="drop"), KEY_AXES)

    return dataclasses.replace(
        segment,
        keys=write(segment.keys, keys),
        values=write(segment.values, values),
        positions=segment.positions.at[rows, slots].set(positions, mode="drop"),
    )


def slot_of(segment: ExactSegment, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The slot of each position, at least 0."""
    sinks = segment.num_sinks
    in_ring = sinks + (positions - sinks) % segment.ring_slots
    return jnp.where(positions < sinks, positions, in_ring)


def _round(layer: LayerCache, due: Bool[Array, "B"], *, placement: Placement) -> LayerCache:
    """Moves the ring's U oldest tokens into the body, in the rows that are due."""
    exact, body = layer.exact, layer.body
    oldest = jnp.min(exact.positions[:, exact.num_sinks :], axis=1)  # of a full ring
    positions = oldest[:, None] + jnp.arange(exact.round_tokens, dtype=jnp.int32)[None]  # B U
    slots = slot_of(exact, jnp.maximum(positions, 0))
    moved = tuple(jnp.take_along_axis(array, slots[:, None, :, None], axis=2) for array in (exact.keys, exact.values))
    positions = jnp.where(due[:, None], positions, axes.EMPTY)
    starts = jnp.sum(body.positions[:, 0] >= 0, axis=1).astype(jnp.int32)
    chosen = _choose(body, moved, positions=positions, queries=None, is_first=due & (starts == 0))
    body = dataclasses.replace(body, chosen=chosen)
    body = _store(body, moved, positions=positions, starts=starts, due=due, placement=placement)
    rows = jnp.arange(due.shape[0], dtype=jnp.int32)[:, None]
    emptied = jnp.where(due[:, None], slots, exact.num_slots)
    left = exact.positions.at[rows, emptied].set(axes.EMPTY, mode="drop")
    return dataclasses.replace(layer, exact=dataclasses.replace(exact, positions=left), body=body)


def _choose(
    body: Body,
    vectors: tuple[jax.Array, jax.Array],
    *,
    positions: Int[Array, "B S"],
    queries: Float[Array, "B T N D"] | None,
    is_first: Bool[Array, "B"],
) -> tuple[Arrays, Arrays]:
    """What the codecs settle by these tokens, in rows that store their first ones; what they had in the others."""
    chosen = []
    for index, codec in enumerate(body.codecs):
        new = codec.choose(vectors[index], positions=positions, queries=queries, arrays=body.fitted[index])

        def pick(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(is_first.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        chosen.append(jax.tree.map(pick, body.chosen[index], new))
    return (chosen[0], chosen[1])


def _store(
    body: Body,
    vectors: tuple[jax.Array, jax.Array],
    *,
    positions: Int[Array, "B S"],
    starts: Int[Array, "B"],
    due: Bool[Array, "B"],
    placement: Placement,
) -> Body:
    """Encodes vectors `B K S D` and writes them from each due row's start on."""

    def write_row(old: jax.Array, new: jax.Array, start: jax.Array, due: jax.Array, axis: int) -> jax.Array:
        kept = jax.lax.dynamic_slice_in_dim(old, start, new.shape[axis], axis=axis)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(due, new, kept), start, axis=axis)

    def write(old: jax.Array, new: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        at = starts * entries[0] // entries[1]
        rows = jax.vmap(write_row, in_axes=(0, 0, 0, 0, None))
        return rows(old, new, at, due, axis - 1)

    stored = []
    for index, (codec, old) in enumerate(zip(body.codecs, (body.keys, body.values), strict=True)):
        new = codec.encode(vectors[index], positions=positions, arrays=body.arrays(index))
        parts = tuple(one.map_tokens(write, other) for one, other in zip(old, new, strict=True))
        stored.append(place_heads(parts, placement))
    spread = jnp.broadcast_to(positions[:, None], (positions.shape[0], body.positions.shape[1], positions.shape[1]))
    written = place_heads(write(body.positions, spread, axis=2, entries=(1, 1)), placement)
    return dataclasses.replace(body, keys=stored[0], values=stored[1], positions=written)


def fill(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    placement: Placement,
) -> LayerCache:
    """Stores a whole prompt in an empty layer, as if its tokens had come one by one.

    Args:
      layer: an empty layer.
      queries: `B T N D`, rotated; codecs may look at the last ones.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`: 0, 1, ... and -1 past a row's length, where what is stored cannot matter.
      placement: where the arrays live.
    """
    exact, body, round_tokens = layer.exact, layer.body, layer.exact.round_tokens
    vectors = tuple(jnp.swapaxes(array, 1, 2) for array in (keys, values))  # B K T D
    lengths = jnp.sum(positions >= 0, axis=1).astype(jnp.int32)
    num_tokens = positions.shape[1]
    beyond = jnp.maximum(lengths - exact.num_slots, 0)
    coded = jnp.where(beyond > 0, -(-beyond // round_tokens) * round_tokens, 0)  # B, tokens of the body
    exact = _fill_exact(exact, vectors, positions=positions, coded=coded, placement=placement)
    most = max(num_tokens - exact.num_slots, 0)
    num_coded = -(-most // round_tokens) * round_tokens
    if body is None or num_coded == 0:
        return dataclasses.replace(layer, exact=exact)
    sinks = exact.num_sinks
    old = tuple(array[:, :, sinks : sinks + num_coded] for array in vectors)
    offsets = jnp.arange(num_coded, dtype=jnp.int32)[None]
    old_positions = jnp.where(offsets < coded[:, None], sinks + offsets, axes.EMPTY)
    last = _last_queries(queries, lengths)
    chosen = _choose(body, old, positions=old_positions, queries=last, is_first=coded > 0)
    body = dataclasses.replace(body, chosen=chosen)
    body = _fill_body(body, old, positions=old_positions, round_tokens=round_tokens, placement=placement)
    return dataclasses.replace(layer, exact=exact, body=body)


def _fill_exact(
    exact: ExactSegment,
    vectors: tuple[jax.Array, jax.Array],
    *,
    positions: axes.Positions,
    coded: Int[Array, "B"],
    placement: Placement,
) -> ExactSegment:
    """Sinks and the tokens after the coded ones, each in its slot."""
    num_tokens, sinks = positions.shape[1], exact.num_sinks
    if num_tokens <= exact.num_slots:  # nothing is coded, slot is position: one block copy

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            return placement.constrain(jax.lax.dynamic_update_slice(cached, new, (0, 0, 0, 0)), KEY_AXES)

        stored = jax.lax.dynamic_update_slice(exact.positions, positions, (0, 0))
        return dataclasses.replace(
            exact, keys=write(exact.keys, vectors[0]), values=write(exact.values, vectors[1]), positions=stored
        )
    # The token of ring slot r is the first one from sinks + coded on that falls into it.
    ring = jnp.arange(exact.ring_slots, dtype=jnp.int32)[None]
    first = coded[:, None]
    tokens = sinks + first + (ring - first) % exact.ring_slots  # B W+U
    head = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (tokens.shape[0], sinks))
    tokens = jnp.concatenate([head, tokens], axis=1)
    lengths = jnp.sum(positions >= 0, axis=1, keepdims=True)
    held = jnp.minimum(tokens, num_tokens - 1)[:, None, :, None]
    keys, values = (placement.constrain(jnp.take_along_axis(array, held, axis=2), KEY_AXES) for array in vectors)
    return dataclasses.replace(
        exact, keys=keys, values=values, positions=jnp.where(tokens < lengths, tokens, axes.EMPTY)
    )


def _fill_body(
    body: Body,
    vectors: tuple[jax.Array, jax.Array],
    *,
    positions: Int[Array, "B S"],
    round_tokens: int,
    placement: Placement,
) -> Body:
    """Encodes a prompt's coded tokens, a block at a time where they are many, so that no decoded copy is laid out."""
    num_slots = positions.shape[1]
    block = min(-(-_FILL_SLOTS // round_tokens) * round_tokens, num_slots)
    everywhere = jnp.ones((positions.shape[0],), jnp.bool_)

    def step(index: jax.Array | int, body: Body) -> Body:
        # The last block is moved back to end with the tokens; what it shares with its neighbour is written twice.
        start = jnp.minimum(index * block, num_slots - block)
        some = tuple(jax.lax.dynamic_slice_in_dim(array, start, block, axis=2) for array in vectors)
        some_positions = jax.lax.dynamic_slice_in_dim(positions, start, block, axis=1)
        starts = jnp.broadcast_to(start, (positions.shape[0],))
        return _store(body, some, positions=some_positions, starts=starts, due=everywhere, placement=placement)

    return jax.lax.fori_loop(0, -(-num_slots // block), step, body)


def _last_queries(queries: axes.Queries, lengths: Int[Array, "B"]) -> jax.Array:
    """The last `QUERY_WINDOW` queries of each row, zeros where it has fewer, `B 32 N D`."""
    tokens = lengths[:, None] - 1 - jnp.arange(QUERY_WINDOW, dtype=jnp.int32)[None]
    found = jnp.take_along_axis(queries, jnp.maximum(tokens, 0)[:, :, None, None], axis=1)
    return jnp.where((tokens >= 0)[:, :, None, None], found, 0)
