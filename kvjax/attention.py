"""Attention over a cache: the new tokens are written, then read together with what is kept.

`prefill_layer` runs a plain causal pass over a prompt (`kvjax/causal.py`) and stores the prompt's keys and values;
`decode_layer` appends a few tokens and attends over exact segment and body with one softmax; `observe_layer` gathers
statistics. Positions alone say who may see whom.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from kvjax import axes
from kvjax._kernels import Attended, Segment, choose_attention, decode_attention
from kvjax.cache import ExactSegment, KVCache, LayerCache, PromptTokens
from kvjax.causal import add_mass, attention_with_mass, causal_attention
from kvjax.evidence import Evidence, begin, hear, strength
from kvjax.filling import fill, last_queries_of, waits
from kvjax.pages import best_pages
from kvjax.rounds import append, slot_of
from kvjax.sharding import Placement
from kvjax.statistics import LayerStatistics, observe


def prefill_layer(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, LayerCache]:
    """Attention of a prompt over itself, uncompressed, and the empty layer filled with it.

    Args:
      layer: an empty layer.
      queries: `B T N D`, rotated.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`: 0, 1, ..., then -1 past a row's length.
      output: the block's output projection; only some selections look at it.
      placement: where the arrays live.
    """
    tokens = {"values": values, "positions": positions}
    numbers, state = {}, layer.state
    mass = None if state is None else state.mass
    if mass is None or state.selection.replay:
        attended = causal_attention(queries, keys, **tokens)
        if mass is not None:
            numbers[mass] = jnp.zeros((keys.shape[0], keys.shape[2], keys.shape[1]), jnp.float32)
    else:
        attended, numbers[mass] = attention_with_mass(queries, keys, **tokens, mass=mass)
    if state is not None:
        layer = dataclasses.replace(layer, state=hear(state, queries, positions=positions, shape=layer.site.shape))
        if "strength" in state.selection.numbers:
            numbers["strength"] = jnp.swapaxes(strength(values, output), 1, 2)
    lengths = jnp.sum(positions >= 0, axis=1).astype(jnp.int32)
    prompt = PromptTokens(
        keys=jnp.swapaxes(keys, 1, 2),
        values=jnp.swapaxes(values, 1, 2),
        positions=positions,
        numbers=numbers,
        last_queries=last_queries_of(queries, lengths),
        replayed=jnp.int32(0),
    )
    if waits(layer):
        return attended, dataclasses.replace(layer, prompt=prompt)
    return attended, fill(layer, prompt, placement=placement)


def replay_layer(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, LayerCache]:
    """Attention of a chunk of the prompt, read again behind the whole prompt, which is not stored yet.

    What the chunk's queries give to the prompt's tokens is weighed among the sinks, the chunk's first reading and the
    second; arguments as above.
    """
    del output
    prompt, sinks = layer.prompt, layer.exact.num_sinks
    own = Segment.of_arrays(queries, jnp.swapaxes(keys, 1, 2), values=jnp.swapaxes(values, 1, 2), positions=positions)
    scale = 1.0 / math.sqrt(queries.shape[-1])

    def attended(prompt_positions: jax.Array, mass: str | None) -> tuple[Attended, ...]:
        first = Segment.of_arrays(queries, prompt.keys, values=prompt.values, positions=prompt_positions)
        return decode_attention((first, own), query_positions=positions, scale=scale, mass=mass, mesh=placement.mesh)

    whole = attended(prompt.positions, None)
    in_chunk = (prompt.positions >= prompt.replayed) & (prompt.positions < prompt.replayed + keys.shape[1])
    read = in_chunk | (prompt.positions < sinks)
    mass = layer.state.mass
    weighed = attended(jnp.where(read, prompt.positions, axes.EMPTY), mass)
    numbers = {**prompt.numbers, mass: add_mass(mass, prompt.numbers[mass], weighed[0].mass)}
    layer = dataclasses.replace(layer, prompt=dataclasses.replace(prompt, numbers=numbers))
    return (whole[0].output + whole[1].output).astype(queries.dtype), layer


def decode_layer(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, LayerCache]:
    """Appends new tokens to a layer that has room and attends over all that it holds; arguments as above."""
    exact = append(layer.exact, keys, values=values, positions=positions, placement=placement)
    layer = dataclasses.replace(layer, exact=exact)
    if layer.state is not None:
        layer = _listen(layer, queries, values=values, positions=positions, output=output)
    return attend(layer, queries, positions=positions, placement=placement)


def _listen(
    layer: LayerCache,
    queries: axes.Queries,
    *,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
) -> LayerCache:
    """Evidence with the new queries, and none yet for the new tokens, or what their values alone say."""
    state = hear(layer.state, queries, positions=positions, shape=layer.site.shape)
    new = {name: None for name in state.exact}
    if "strength" in new:
        new["strength"] = strength(values, output)
    slots = jnp.where(positions >= 0, slot_of(layer.exact, positions), layer.exact.num_slots)
    return dataclasses.replace(layer, state=dataclasses.replace(state, exact=begin(state.exact, slots, new)))


def attend(
    layer: LayerCache, queries: axes.Queries, *, positions: axes.Positions, placement: Placement
) -> tuple[axes.Queries, LayerCache]:
    """Attention of queries over all that a layer holds, one softmax over exact segment and body.

    Args:
      layer: the layer.
      queries: `B T N D`, rotated.
      positions: `B T`, theirs; -1 is padding.
      placement: where the arrays live.

    Returns:
      `B T N D`, and the layer with the masses of its tokens added to, where a selection asked for them.
    """
    if layer.state is not None and layer.state.pages is not None and queries.shape[1] > 1:
        return _token_by_token(layer, queries, positions, placement), layer
    scale = 1.0 / math.sqrt(queries.shape[-1])
    segments = segments_of(layer, queries, mesh=placement.mesh)
    mass = None if layer.state is None else layer.state.mass
    attended = decode_attention(segments, query_positions=positions, scale=scale, mass=mass, mesh=placement.mesh)
    output = attended[0].output
    if layer.body is not None:
        codec, arrays = layer.body.codecs[1], layer.body.arrays(1)
        output = output + codec.finish_output(attended[1].output, attended[1].weight, arrays)
    if mass is not None:
        layer = dataclasses.replace(layer, state=_with_mass(layer.state, mass, attended))
    return output.astype(queries.dtype), layer


def _with_mass(state: Evidence, mass: str, attended: tuple[Attended, ...]) -> Evidence:
    """Evidence with the masses of these queries added."""
    exact = {**state.exact, mass: add_mass(mass, state.exact[mass], attended[0].mass)}
    body = state.body
    if len(attended) > 1:
        body = {**body, mass: add_mass(mass, body[mass], attended[1].mass)}
    return dataclasses.replace(state, exact=exact, body=body)


def _token_by_token(
    layer: LayerCache, queries: axes.Queries, positions: axes.Positions, placement: Placement
) -> axes.Queries:
    """Each token reads pages of its own choice, so that a chunk gives what single tokens do."""

    def one(token: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, position = token
        return attend(layer, query[:, None], positions=position[:, None], placement=placement)[0][:, 0]

    outputs = jax.lax.map(one, (jnp.swapaxes(queries, 0, 1), positions.T))
    return jnp.swapaxes(outputs, 0, 1)


def segments_of(layer: LayerCache, queries: axes.Queries, *, mesh: Mesh | None) -> tuple[Segment, ...]:
    """What queries attend to: the exact segment, and the body where there is one; `mesh` as in `Placement`."""
    return (_exact_segment(layer.exact, queries), *_body_segments(layer, queries, mesh))


def attention_implementations(cache: KVCache) -> dict[str, str]:
    """What runs the attention of decode steps over a cache, and why nothing better: by segment, "exact" and "body".

    Layers that differ are named one after another.
    """
    found: dict[str, dict[str, None]] = {}
    mesh = cache.placement.mesh

    def note(layer: LayerCache, queries: axes.Queries) -> None:
        for name, segment in zip(("exact", "body"), segments_of(layer, queries, mesh=mesh), strict=False):
            choice = choose_attention(segment, mesh=mesh)
            words = f"{choice.name} ({'; '.join(choice.reasons)})" if choice.reasons else choice.name
            found.setdefault(name, {})[words] = None

    for layer in cache.layers:
        batch, num_heads, size = cache.num_seen.shape[0], cache.shape.num_query_heads, layer.exact.keys.shape[3]
        jax.eval_shape(note, layer, jax.ShapeDtypeStruct((batch, 1, num_heads, size), layer.exact.keys.dtype))
    return {name: ", ".join(words) for name, words in found.items()}


def _exact_segment(exact: ExactSegment, queries: axes.Queries) -> Segment:
    return Segment.of_arrays(queries, exact.keys, values=exact.values, positions=exact.positions)


def _body_segments(layer: LayerCache, queries: axes.Queries, mesh: Mesh | None) -> tuple[Segment, ...]:
    """The body, or its pages that are read, with the queries as its keys want them; nothing where there is none."""
    body = layer.body
    if body is None:
        return ()
    key_codec, value_codec = body.codecs
    prepared, bias = key_codec.prepare_query(queries, body.arrays(0))
    segment = Segment(
        queries=prepared,
        keys=body.keys,
        values=body.values,
        positions=body.positions,
        bias=bias,
        owners=body.owners,
        num_kv_heads=layer.site.shape.num_kv_heads,
    )
    if layer.state is not None and layer.state.pages is not None:
        sizes = layer.site.policy.exact
        tokens = max(layer.state.selection.tokens(layer.site.max_tokens) - sizes.sinks - sizes.window, 0)
        count = max(tokens // layer.state.selection.page, 1)
        segment = best_pages(segment, layer.state, queries, count=count, mesh=mesh)
    return (
        dataclasses.replace(
            segment,
            keys=key_codec.readable(segment.keys, body.arrays(0)),
            values=value_codec.readable(segment.values, body.arrays(1)),
        ),
    )


def observe_layer(
    layer: LayerStatistics,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, LayerStatistics]:
    """A plain causal pass that counts its queries, keys and values into statistics."""
    del output, placement
    attended = causal_attention(queries, keys, values=values, positions=positions)
    return attended, observe(layer, queries, keys=keys, values=values, positions=positions)
