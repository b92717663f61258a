"""Empty caches: a policy is fitted to a model's layers, and arrays of its sizes are made where they will live."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import axes
from kvjax.cache import KEY_AXES, Body, ExactSegment, KVCache, LayerCache, Site, place_heads
from kvjax.codec import Codec
from kvjax.evidence import empty_evidence
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.selection import Selection
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays, LayerFacts

Fitted = tuple[tuple[Arrays, Arrays, Arrays], ...]
"""For each layer the arrays of its codecs, of keys and of values, and of its selection."""

Static = tuple[tuple[Codec, Codec, Selection | None], ...]


def fit_policy(shape: ModelShape, policy: Policy, placement: Placement, statistics: Any) -> tuple[Static, Fitted]:
    """The codecs and the selection of each layer, and their fitted arrays, on the host.

    Raises:
      UserError: the model does not suit the policy, or it needs statistics and there are none.
    """
    return _fit(shape, policy, placement.device, statistics)


@functools.lru_cache(maxsize=8)  # every batch of a run asks for the same
def _fit(shape: ModelShape, policy: Policy, device: jax.Device, statistics: Any) -> tuple[Static, Fitted]:
    static, fitted = [], []
    for layer in range(shape.num_layers):
        facts = LayerFacts(
            shape=shape,
            layer=layer,
            role="keys",
            statistics=None if statistics is None else statistics.layers[layer],
        )
        codecs = policy.codecs(layer, shape.num_layers)
        pairs = [codec.fit(dataclasses.replace(facts, role=codec.role), device=device) for codec in codecs]
        selection, arrays = policy.selection_of(layer, shape.num_layers), {}
        if selection is not None:
            selection, arrays = selection.fit(facts)
        static.append((pairs[0][0], pairs[1][0], selection))
        fitted.append((pairs[0][1], pairs[1][1], arrays))
    return tuple(static), tuple(fitted)


def empty_cache(
    shape: ModelShape,
    *,
    policy: Policy,
    batch: int,
    max_tokens: int,
    placement: Placement = Placement(),
    statistics: Any = None,
) -> KVCache:
    """An empty cache, on the device(s) of `placement`.

    Args:
      shape: facts of the model.
      policy: what is kept.
      batch: B, sequences.
      max_tokens: tokens, prompt and new ones together, that a sequence may see.
      placement: where the arrays live.
      statistics: of the model (`kvjax.load_statistics`), for codecs that need them.

    Raises:
      UserError: the model does not suit the policy, it needs statistics and there are none, or its budget is smaller
        than what it protects.
    """
    static, fitted = fit_policy(shape, policy, placement, statistics)
    return _build(fitted, shape, policy, static, batch, max_tokens, placement)


@functools.lru_cache(maxsize=8)  # on a mesh it compiles, and a run asks for the same few caches again and again
def abstract_cache(
    shape: ModelShape,
    *,
    policy: Policy,
    batch: int,
    max_tokens: int,
    placement: Placement = Placement(),
    statistics: Any = None,
) -> KVCache:
    """The same as shapes and shardings only, for compiling without memory; the devices need not be there."""
    static, fitted = fit_policy(shape, policy, placement, statistics)
    lowered = _build.lower(fitted, shape, policy, static, batch, max_tokens, placement)
    shardings = lowered.compile().output_shardings if placement.mesh is not None else None
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.out_info)
    if shardings is None:
        return described
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), described, shardings
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))  # compiled: no device ever holds more than its part
def _build(
    fitted: Fitted,
    shape: ModelShape,
    policy: Policy,
    static: Static,
    batch: int,
    max_tokens: int,
    placement: Placement,
) -> KVCache:
    def zeros() -> jax.Array:
        return placement.constrain(jnp.zeros((batch,), jnp.int32), "B")

    def layer(index: int) -> LayerCache:
        exact = _empty_exact(shape, policy, batch, max_tokens, placement)
        plan = policy.plan(index, shape=shape, max_tokens=max_tokens)
        site = Site(index=index, shape=shape, policy=policy, plan=plan, max_tokens=max_tokens)
        key, value, selection = static[index]
        body = None
        heads = 1 if plan.pooled or selection is None or selection.page else shape.num_kv_heads
        if plan.slots:
            sizes = {"batch": batch, "num_slots": plan.slots, "heads": heads, "pooled": plan.pooled}
            body = empty_body((key, value), fitted[index][:2], **sizes, placement=placement)
        if selection is None:
            return LayerCache(exact=exact, body=body, site=site)
        state = empty_evidence(
            selection,
            fitted[index][2],
            shape=shape,
            batch=batch,
            exact_slots=exact.num_slots,
            body=(1 if plan.pooled else shape.num_kv_heads, plan.slots),
            placement=placement,
        )
        return LayerCache(exact=exact, body=body, state=state, site=site)

    return KVCache(
        layers=tuple(layer(index) for index in range(shape.num_layers)),
        num_seen=zeros(),
        num_pinned=zeros(),
        policy=policy,
        shape=shape,
        max_tokens=max_tokens,
        placement=placement,
    )


def _empty_exact(shape: ModelShape, policy: Policy, batch: int, max_tokens: int, placement: Placement) -> ExactSegment:
    """All slots empty; a plain ring of `max_tokens` where these fit without a body."""
    sizes = policy.exact
    has_body = policy.body_slots(max_tokens) > 0
    num_slots = sizes.sinks + sizes.window + sizes.round if has_body else max_tokens
    zeros = jnp.zeros((batch, shape.num_kv_heads, num_slots, shape.head_size), jnp.dtype(shape.dtype))
    return ExactSegment(
        keys=placement.constrain(zeros, KEY_AXES),
        values=placement.constrain(zeros, KEY_AXES),
        positions=placement.constrain(jnp.full((batch, num_slots), axes.EMPTY, jnp.int32), "B S"),
        num_sinks=sizes.sinks if has_body else 0,
        round_tokens=sizes.round,
    )


def empty_body(
    codecs: tuple[Codec, Codec],
    fitted: tuple[Arrays, Arrays],
    *,
    batch: int,
    num_slots: int,
    heads: int,
    pooled: bool,
    placement: Placement,
) -> Body:
    """All slots empty.

    Args:
      codecs: of keys and of values, fitted.
      fitted: their arrays.
      batch: B.
      num_slots: S, of all heads together in a pool.
      heads: of the positions, 1 where all heads hold the same tokens or share a pool.
      pooled: whether heads share a pool.
      placement: where the arrays live.
    """
    parts, chosen = [], []
    for codec, arrays in zip(codecs, fitted, strict=True):
        layout = codec.layout(arrays, batch=batch, num_slots=num_slots)
        if pooled:
            layout = (_one_head(layout[0]), layout[1])
        stored, picked = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout)
        parts.append(place_heads(stored, placement))
        chosen.append(place_heads(picked, placement))
    positions = jnp.full((batch, heads, num_slots), axes.EMPTY, jnp.int32)
    return Body(
        keys=parts[0],
        values=parts[1],
        positions=place_heads(positions, placement),
        owners=place_heads(jnp.zeros_like(positions), placement) if pooled else None,
        fitted=jax.tree.map(jnp.asarray, fitted),
        chosen=(chosen[0], chosen[1]),
        codecs=codecs,
    )


def _one_head(tree: Any) -> Any:
    """Shapes `B k ...` as `B 1 ...`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.shape[0], 1, *leaf.shape[2:]), leaf.dtype), tree)
