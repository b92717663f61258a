"""How tokens move: into the exact segment, and from there, a round at a time, into the body.

    sinks        ring of W + U slots, the newest tokens               body
    [0 1 2 3]    [132 133 ... 4 + W + U - 1 | 128 129 130 131]        [4 5 6 ... 127 | - - -]
                                              U oldest  ---- round ---------------->

A round comes due when the ring is full and one more token wants in: before that token is written, the ring's U oldest
tokens are encoded and appended to the body, and the W newest stay exact. Which tokens are exact at any moment depends
on positions alone, never on how the tokens arrived, so a token sees the same cache whether it comes alone or in a
chunk.

With a selection the body has fewer slots than tokens will come: its tokens and the U that come are scored together, and
the best stay (`kvjax/eviction.py`, `kvjax/compaction.py`). Rows come due at steps of their own.

Rounds come first in a step, before anything reads the body: then XLA updates bodies in place. A round at the end of a
step, after attention has read them, cost a copy of every body on CPUs.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from kvjax import axes
from kvjax._kernels import Coded, Parts
from kvjax.cache import KEY_AXES, Body, ExactSegment, KVCache, LayerCache, place_heads
from kvjax.compaction import absorb, spread_heads, write_rows
from kvjax.eviction import Moved, Row, agree, round_candidates
from kvjax.keeping import kept_units
from kvjax.pages import add_pages
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays

Layers = tuple[LayerCache, ...]
Round = Callable[[Layers], Layers]


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

    def run(layers: Layers) -> Layers:
        moved = [_oldest(layer, due) for layer in layers]
        kept = _kept(cache, layers, [tokens for tokens, _ in moved])
        return tuple(
            _round(layer, *tokens, kept=stays, due=due, placement=cache.placement)
            for layer, tokens, stays in zip(layers, moved, kept, strict=True)
        )

    on_tpu = cache.placement.device_kind.startswith("TPU")
    where_due = _by_branch if on_tpu and any(_has_floats(layer.body) for layer in cache.layers) else _by_loop
    return dataclasses.replace(cache, layers=where_due(run, cache.layers, jnp.any(due)))


def _by_branch(run: Round, layers: Layers, due: Bool[Array, ""]) -> Layers:
    """Runs a round or nothing.

    On GPUs, XLA copies whatever is handed through here, twice a step.
    """
    return jax.lax.cond(due, run, lambda layers: layers, layers)


def _by_loop(run: Round, layers: Layers, due: Bool[Array, ""]) -> Layers:
    """The same as a loop that runs once or never.

    On TPUs it carries arrays laid out as the round wants them, which for floats may be another order than the kernels':
    a step of `snapkv(budget=2048)` on v6e moves 3.4 GB like this and 2.7 as a branch; one of `int4`, 5.0 and 5.3.
    """
    _, layers = jax.lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(due), run(carry[1])), (due, layers)
    )
    return layers


def _has_floats(body: Body) -> bool:
    """Whether any numbers of a body are floats, not bytes."""
    parts = jax.tree.leaves((body.keys, body.values), is_leaf=lambda part: isinstance(part, Coded))
    return any(isinstance(part, Coded) and part.bits is None and not part.dtype for part in parts)


def _oldest(layer: LayerCache, due: Bool[Array, "B"]) -> tuple[Moved, Int[Array, "B U"]]:
    """The ring's U oldest tokens and their slots, of a full ring."""
    oldest = jnp.min(layer.exact.positions[:, layer.exact.num_sinks :], axis=1, keepdims=True)
    return _of_ring(layer, oldest + jnp.arange(layer.exact.round_tokens, dtype=jnp.int32)[None], due)


def _of_ring(layer: LayerCache, positions: Int[Array, "B U"], due: Bool[Array, "B"]) -> tuple[Moved, Int[Array, "B U"]]:
    """Tokens of the exact segment by their positions, and their slots; positions are -1 in rows that are not due."""
    exact = layer.exact
    slots = slot_of(exact, jnp.maximum(positions, 0))

    def take(array: jax.Array) -> jax.Array:
        index = slots[:, None] if array.ndim == 3 else slots[:, None, :, None]
        return jnp.take_along_axis(array, index, axis=2)

    numbers = {} if layer.state is None else {name: take(array) for name, array in layer.state.exact.items()}
    positions = jnp.where(due[:, None], positions, axes.EMPTY)
    return Moved(keys=take(exact.keys), values=take(exact.values), positions=positions, numbers=numbers), slots


def _kept(cache: KVCache, layers: tuple[LayerCache, ...], moved: list[Moved]) -> list[jax.Array | None]:
    """What the body of each layer keeps; None where it keeps all."""
    row = Row(num_seen=cache.num_seen, num_pinned=cache.num_pinned)
    candidates = {}
    for index, (layer, tokens) in enumerate(zip(layers, moved, strict=True)):
        if layer.state is None or layer.state.selection.page:
            continue
        exact, everywhere = layer.exact, jnp.ones(cache.num_seen.shape, jnp.bool_)
        after = tokens.positions[:, -1:] + 1
        window = after + jnp.arange(exact.ring_slots - exact.round_tokens, dtype=jnp.int32)[None]
        newest, _ = _of_ring(layer, window, everywhere)
        candidates[index] = round_candidates(layer, tokens, newest, row=row, placement=cache.placement)
    scores = agree({index: layers[index].state.selection.score(one.view) for index, one in candidates.items()}, layers)
    kept = kept_units(list(candidates.values()), [scores[index] for index in candidates])
    by_layer = dict(zip(candidates, kept, strict=True))
    return [by_layer.get(index) for index in range(len(layers))]


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

    # Compared and chosen: one kernel on a GPU, where a scatter has kernels of its own to read, to choose and to write.
    here = slots[:, :, None] == jnp.arange(segment.num_slots, dtype=jnp.int32)[None, None, :]  # B T S
    new = jnp.max(jnp.where(here, positions[:, :, None], axes.EMPTY), axis=1)
    return dataclasses.replace(
        segment,
        keys=write(segment.keys, keys),
        values=write(segment.values, values),
        positions=jnp.where(new >= 0, new, segment.positions),
    )


def slot_of(segment: ExactSegment, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The slot of each position, at least 0."""
    sinks = segment.num_sinks
    in_ring = sinks + (positions - sinks) % segment.ring_slots
    return jnp.where(positions < sinks, positions, in_ring)


def _round(
    layer: LayerCache,
    moved: Moved,
    slots: Int[Array, "B U"],
    *,
    kept: Bool[Array, "B K units"] | None,
    due: Bool[Array, "B"],
    placement: Placement,
) -> LayerCache:
    """Moves the ring's U oldest tokens into the body, in the rows that are due; what is not kept goes."""
    exact, body, state = layer.exact, layer.body, layer.state
    starts = jnp.sum(body.positions[:, 0] >= 0, axis=1).astype(jnp.int32)
    is_first = due & jnp.all(body.positions < 0, axis=(1, 2))
    vectors = (moved.keys, moved.values)
    body = dataclasses.replace(
        body, chosen=choose(body, vectors, positions=moved.positions, queries=None, is_first=is_first)
    )
    codes = encode(body, vectors, positions=moved.positions, placement=placement)
    if kept is None:
        state = add_pages(state, moved.keys, starts=starts, due=due)
        body = store(body, codes, positions=moved.positions, starts=starts, due=due, placement=placement)
    else:
        arguments = {"positions": moved.positions, "numbers": moved.numbers, "kept": kept, "due": due}
        body, state = absorb(body, state, codes, **arguments, unit=layer.site.plan.unit, placement=placement)
    rows = jnp.arange(due.shape[0], dtype=jnp.int32)[:, None]
    emptied = jnp.where(due[:, None], slots, exact.num_slots)
    left = exact.positions.at[rows, emptied].set(axes.EMPTY, mode="drop")
    return dataclasses.replace(layer, exact=dataclasses.replace(exact, positions=left), body=body, state=state)


def choose(
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


def encode(
    body: Body, vectors: tuple[jax.Array, jax.Array], *, positions: Int[Array, "B S"], placement: Placement
) -> tuple[Parts, Parts]:
    """Keys and values `B K S D` as the body stores them."""
    keys, values = (
        codec.encode(vectors[index], positions=positions, arrays=body.arrays(index), mesh=placement.mesh)
        for index, codec in enumerate(body.codecs)
    )
    return keys, values


def store(
    body: Body,
    codes: tuple[Parts, Parts],
    *,
    positions: Int[Array, "B S"],
    starts: Int[Array, "B"],
    due: Bool[Array, "B"],
    placement: Placement,
) -> Body:
    """Writes encoded tokens from each due row's start on."""
    mesh = placement.mesh
    alone = placement.device_kind.startswith("NVIDIA") and (mesh is None or mesh.size == 1)

    def write(old: jax.Array, new: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        if alone:
            # As it lies, what is written decides how XLA lays out what it is written to: `kivi`'s scales were turned
            # around before and after each step. Over a mesh XLA would gather what has a layout of its own.
            new = with_layout_constraint(new, Layout(tuple(range(new.ndim))))
        return write_rows(old, new, starts * entries[0] // entries[1], due, axis=axis)

    stored = []
    for old, new in zip((body.keys, body.values), codes, strict=True):
        parts = tuple(one.map_tokens(write, other) for one, other in zip(old, new, strict=True))
        stored.append(place_heads(parts, placement))
    spread = spread_heads(positions, body.positions.shape[1])
    written = place_heads(write(body.positions, spread, axis=2, entries=(1, 1)), placement)
    return dataclasses.replace(body, keys=stored[0], values=stored[1], positions=written)
