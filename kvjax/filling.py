"""How a whole prompt is stored: as if its tokens had come one by one, and then, with a selection, the best of them.

    prompt    [ sinks | coded tokens, whole rounds of them | W to W + U newest ]
                        all to the body, or those that a selection keeps of them

A prompt's keys and values are compressed layer by layer, so that only one layer's are ever whole; only selections whose
layers agree on one set of tokens, or that look at the prompt twice, wait for all layers (`LayerCache.prompt`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax.cache import KEY_AXES, Body, ExactSegment, KVCache, LayerCache, PromptTokens
from kvjax.compaction import fill_kept
from kvjax.empty import empty_body
from kvjax.eviction import Candidates, Row, agree, prompt_candidates
from kvjax.keeping import kept_units
from kvjax.pages import add_pages
from kvjax.rounds import choose, encode, store
from kvjax.selection import Scores
from kvjax.sharding import Placement

QUERY_WINDOW = 32
"""Last queries of a prompt that codecs may look at when they choose."""

_FILL_SLOTS = 1024  # of a prompt that are encoded together


def fill(layer: LayerCache, prompt: PromptTokens, *, placement: Placement, scores: Scores | None = None) -> LayerCache:
    """Stores a whole prompt in an empty layer.

    Args:
      layer: empty but for its evidence.
      prompt: its tokens, at positions 0, 1, ...; what is stored of padding cannot matter.
      placement: where the arrays live.
      scores: `B K T` of all tokens, agreed between layers; None scores the layer's own.
    """
    exact, body, round_tokens = layer.exact, layer.body, layer.exact.round_tokens
    lengths = jnp.sum(prompt.positions >= 0, axis=1).astype(jnp.int32)
    coded = _num_coded(exact, lengths)
    layer = _fill_exact(layer, prompt, coded=coded, placement=placement)
    most = max(prompt.positions.shape[1] - exact.num_slots, 0)
    num_coded = -(-most // round_tokens) * round_tokens
    if body is None or num_coded == 0:
        return layer
    old, positions = _coded_tokens(exact, prompt, coded, num_coded)
    chosen = choose(body, old, positions=positions, queries=prompt.last_queries, is_first=coded > 0)
    body, state = dataclasses.replace(body, chosen=chosen), layer.state
    settings = {"round_tokens": round_tokens, "placement": placement}
    if state is None or state.selection.page:
        starts, everywhere = jnp.zeros_like(lengths), jnp.ones(lengths.shape, jnp.bool_)
        state = add_pages(state, old[0], starts=starts, due=everywhere)
        return dataclasses.replace(layer, body=_fill_body(body, old, positions=positions, **settings), state=state)
    candidates = _candidates_of(layer, prompt, placement)
    scores = state.selection.score(candidates.view) if scores is None else scores
    (kept,) = kept_units([candidates], [scores])
    batch = lengths.shape[0]
    sizes = {"batch": batch, "num_slots": num_coded, "heads": 1, "pooled": False}
    scratch = empty_body(body.codecs, body.fitted, **sizes, placement=placement)
    scratch = _fill_body(dataclasses.replace(scratch, chosen=chosen), old, positions=positions, **settings)
    sinks = exact.num_sinks
    numbers = {name: array[:, :, sinks : sinks + num_coded] for name, array in prompt.numbers.items()}
    arguments = {"positions": positions, "numbers": numbers, "kept": kept, "unit": layer.site.plan.unit}
    body, state = fill_kept(body, state, scratch, **arguments, placement=placement)
    return dataclasses.replace(layer, body=body, state=state)


def waits(layer: LayerCache) -> bool:
    """Whether a prompt is stored only when all layers have seen it."""
    return layer.state is not None and layer.body is not None and layer.state.selection.waits


def settle(cache: KVCache) -> KVCache:
    """Stores the prompts that waited for all layers."""
    waiting = {index: layer for index, layer in enumerate(cache.layers) if layer.prompt is not None}
    if not waiting:
        return cache
    scores: dict[int, jax.Array] = {}
    for index, layer in waiting.items():
        if layer.prompt.positions.shape[1] > layer.exact.num_slots:
            candidates = _candidates_of(layer, layer.prompt, cache.placement)
            scores[index] = layer.state.selection.score(candidates.view)
    scores = agree(scores, cache.layers)
    layers = list(cache.layers)
    for index, layer in waiting.items():
        bare = dataclasses.replace(layer, prompt=None)
        layers[index] = fill(bare, layer.prompt, placement=cache.placement, scores=scores.get(index))
    return dataclasses.replace(cache, layers=tuple(layers))


def _num_coded(exact: ExactSegment, lengths: Int[Array, "B"]) -> Int[Array, "B"]:
    """Tokens of each row that the exact segment will not hold: whole rounds."""
    beyond = jnp.maximum(lengths - exact.num_slots, 0)
    return jnp.where(beyond > 0, -(-beyond // exact.round_tokens) * exact.round_tokens, 0)


def _coded_tokens(
    exact: ExactSegment, prompt: PromptTokens, coded: Int[Array, "B"], num_coded: int
) -> tuple[tuple[jax.Array, jax.Array], Int[Array, "B S"]]:
    """Keys and values after the sinks, and their positions, -1 where they are not for the body."""
    sinks = exact.num_sinks
    keys, values = (array[:, :, sinks : sinks + num_coded] for array in (prompt.keys, prompt.values))
    offsets = jnp.arange(num_coded, dtype=jnp.int32)[None]
    return (keys, values), jnp.where(offsets < coded[:, None], sinks + offsets, axes.EMPTY)


def _candidates_of(layer: LayerCache, prompt: PromptTokens, placement: Placement) -> Candidates:
    """The candidates for the body of a layer that has not stored the prompt."""
    exact = layer.exact
    lengths = jnp.sum(prompt.positions >= 0, axis=1).astype(jnp.int32)
    most = prompt.positions.shape[1] - exact.num_slots
    num_coded = -(-most // exact.round_tokens) * exact.round_tokens
    _, positions = _coded_tokens(exact, prompt, _num_coded(exact, lengths), num_coded)
    pinned = lengths if layer.site.policy.prompt is not None else jnp.zeros_like(lengths)
    row = Row(num_seen=lengths, num_pinned=pinned)
    return prompt_candidates(layer, prompt, positions, row=row, placement=placement)


def _fill_exact(layer: LayerCache, prompt: PromptTokens, *, coded: Int[Array, "B"], placement: Placement) -> LayerCache:
    """Sinks and the tokens after the coded ones, each in its slot, with their evidence."""
    exact, positions, vectors = layer.exact, prompt.positions, (prompt.keys, prompt.values)
    num_tokens, sinks = positions.shape[1], exact.num_sinks
    if num_tokens <= exact.num_slots:  # nothing is coded, slot is position: one block copy

        def write(cached: jax.Array, new: jax.Array) -> jax.Array:
            return placement.constrain(jax.lax.dynamic_update_slice(cached, new, (0, 0, 0, 0)), KEY_AXES)

        stored = jax.lax.dynamic_update_slice(exact.positions, positions, (0, 0))
        exact = dataclasses.replace(
            exact, keys=write(exact.keys, vectors[0]), values=write(exact.values, vectors[1]), positions=stored
        )
        pads = ((0, 0), (0, 0), (0, exact.num_slots - num_tokens))
        return _with_numbers(layer, exact, {name: jnp.pad(array, pads) for name, array in prompt.numbers.items()})
    # The token of ring slot r is the first one from sinks + coded on that falls into it.
    ring = jnp.arange(exact.ring_slots, dtype=jnp.int32)[None]
    first = coded[:, None]
    tokens = sinks + first + (ring - first) % exact.ring_slots  # B W+U
    head = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (tokens.shape[0], sinks))
    tokens = jnp.concatenate([head, tokens], axis=1)
    lengths = jnp.sum(positions >= 0, axis=1, keepdims=True)
    held = jnp.minimum(tokens, num_tokens - 1)[:, None, :, None]
    keys, values = (placement.constrain(jnp.take_along_axis(array, held, axis=2), KEY_AXES) for array in vectors)
    exact = dataclasses.replace(
        exact, keys=keys, values=values, positions=jnp.where(tokens < lengths, tokens, axes.EMPTY)
    )
    taken = {name: jnp.take_along_axis(array, held[..., 0], axis=2) for name, array in prompt.numbers.items()}
    return _with_numbers(layer, exact, taken)


def _with_numbers(layer: LayerCache, exact: ExactSegment, numbers: dict[str, jax.Array]) -> LayerCache:
    state = layer.state if layer.state is None else dataclasses.replace(layer.state, exact=numbers)
    return dataclasses.replace(layer, exact=exact, state=state)


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
        codes = encode(body, some, positions=some_positions)
        return store(body, codes, positions=some_positions, starts=starts, due=everywhere, placement=placement)

    return jax.lax.fori_loop(0, -(-num_slots // block), step, body)


def last_queries_of(queries: axes.Queries, lengths: Int[Array, "B"]) -> jax.Array:
    """The last `QUERY_WINDOW` queries of each row, zeros where it has fewer, `B 32 N D`."""
    tokens = lengths[:, None] - 1 - jnp.arange(QUERY_WINDOW, dtype=jnp.int32)[None]
    found = jnp.take_along_axis(queries, jnp.maximum(tokens, 0)[:, :, None, None], axis=1)
    return jnp.where((tokens >= 0)[:, :, None, None], found, 0)
