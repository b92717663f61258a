"""The cache: a tuple of per-layer caches and a count of tokens per sequence, all plain pytrees of fixed shapes.

    KVCache
      num_seen   [B]               tokens that a sequence has seen; the next one's position
      layers     one LayerCache a layer
        exact    ExactSegment      the sinks, then a ring of the newest tokens, in the model's dtype
          keys      [B K S D]      rotated at the position of their slot
          values    [B K S D]
          positions [B S]          -1 = empty slot
        body     Body              all tokens between, coded; None where the exact segment holds every token
          keys, values             parts, `B K S...` (kernels_pallas/coded.py)
          positions [B 1 S]        [B K S] where heads keep different tokens; ascending, -1 = empty slot
        state    None              owned by the selection (policies that evict)

There is no length, mask or validity array: all three follow from positions. What lies in an empty slot cannot matter.
A cache is an argument and a result, never a module's variable; every update returns a new one, and the compiled steps
donate the old one, so that its buffers are updated in place. How tokens move is in `kvjax/rounds.py`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kvjax import axes
from kvjax.codec import Codec
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays, LayerFacts

KEY_AXES = "B K S D"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "positions"),
    meta_fields=("num_sinks", "round_tokens"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSegment:
    """P sinks and a ring of the newest tokens: position p lies in slot p if p < P, else in P + (p - P) mod (S - P).

    Attributes:
      keys: `B K S D`, rotated at their own position.
      values: `B K S D`.
      positions: `B S` int32, one for all heads; -1 is an empty slot.
      num_sinks: P (static).
      round_tokens: U, those that move to the body together (static).
    """

    keys: Any
    values: Any
    positions: Any
    num_sinks: int = 0
    round_tokens: int = 1

    @property
    def num_slots(self) -> int:
        """S, the capacity."""
        return self.positions.shape[-1]

    @property
    def ring_slots(self) -> int:
        """W + U, slots of the ring."""
        return self.num_slots - self.num_sinks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "positions", "fitted", "chosen"),
    meta_fields=("codecs",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Coded tokens.

    Attributes:
      keys: parts, `B K S...`.
      values: parts.
      positions: `B 1 S` int32, ascending along S up to the -1 of empty slots; `B K S` where heads differ.
      fitted: arrays of the two codecs that belong to the layer, without a batch axis.
      chosen: arrays that a row's first stored tokens settled, `B K ...`; without meaning while the row's body is empty.
      codecs: of keys and of values, fitted (static).
    """

    keys: Any
    values: Any
    positions: Any
    fitted: tuple[Arrays, Arrays]
    chosen: tuple[Arrays, Arrays]
    codecs: tuple[Codec, Codec]

    @property
    def num_slots(self) -> int:
        """S, the capacity."""
        return self.positions.shape[-1]

    def arrays(self, index: int) -> Arrays:
        """What the codec of keys (0) or values (1) needs."""
        return {**self.fitted[index], **self.chosen[index]}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("exact", "body", "state"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The cache of one layer.

    Attributes:
      exact: tokens in the model's dtype.
      body: coded tokens, or None.
      state: whatever the selection carries from step to step, or None.
    """

    exact: Any
    body: Any = None
    state: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "num_seen"),
    meta_fields=("policy", "shape", "max_tokens", "placement"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The cache of a batch of sequences.

    Attributes:
      layers: one `LayerCache` a layer; capacities may differ.
      num_seen: `B` int32, tokens seen by each sequence.
      policy: what is kept (static).
      shape: facts of the model (static).
      max_tokens: tokens that a sequence may see in all (static).
      placement: where the arrays live (static).
    """

    layers: Any
    num_seen: Any
    policy: Policy
    shape: ModelShape
    max_tokens: int
    placement: Placement


Fitted = tuple[tuple[Arrays, Arrays], ...]


@functools.lru_cache(maxsize=8)  # every batch of a run asks for the same
def fit_codecs(
    shape: ModelShape, policy: Policy, placement: Placement, statistics: Any
) -> tuple[tuple[tuple[Codec, Codec], ...], Fitted]:
    """The codecs of each layer and their fitted arrays, on the host.

    Raises:
      UserError: the model does not suit the policy, or it needs statistics and there are none.
    """
    device = placement.mesh.devices.flat[0] if placement.mesh is not None else _default_device()
    codecs, fitted = [], []
    for layer in range(shape.num_layers):
        pair = []
        for codec in policy.codecs(layer, shape.num_layers):
            facts = LayerFacts(
                shape=shape,
                layer=layer,
                role=codec.role,
                statistics=None if statistics is None else statistics.layers[layer],
            )
            pair.append(codec.fit(facts, device=device))
        codecs.append(tuple(codec for codec, _ in pair))
        fitted.append(tuple(arrays for _, arrays in pair))
    return tuple(codecs), tuple(fitted)


def _default_device() -> jax.Device:
    return jax.local_devices()[0]


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
      UserError: the model does not suit the policy, or it needs statistics and there are none.
    """
    codecs, fitted = fit_codecs(shape, policy, placement, statistics)
    return _build(fitted, shape, policy, codecs, batch, max_tokens, placement)


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
    codecs, fitted = fit_codecs(shape, policy, placement, statistics)
    lowered = _build.lower(fitted, shape, policy, codecs, batch, max_tokens, placement)
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
    codecs: tuple[tuple[Codec, Codec], ...],
    batch: int,
    max_tokens: int,
    placement: Placement,
) -> KVCache:
    body_slots = policy.body_slots(max_tokens)
    layers = tuple(
        LayerCache(
            exact=_empty_exact(shape, policy, batch, max_tokens, placement),
            body=_empty_body(pair, arrays, batch, body_slots, placement) if body_slots else None,
        )
        for pair, arrays in zip(codecs, fitted, strict=True)
    )
    return KVCache(
        layers=layers,
        num_seen=placement.constrain(jnp.zeros((batch,), jnp.int32), "B"),
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


def _empty_body(
    codecs: tuple[Codec, Codec], fitted: tuple[Arrays, Arrays], batch: int, num_slots: int, placement: Placement
) -> Body:
    """All slots empty."""
    parts, chosen = [], []
    for codec, arrays in zip(codecs, fitted, strict=True):
        layout = codec.layout(arrays, batch=batch, num_slots=num_slots)
        stored, picked = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), layout)
        parts.append(place_heads(stored, placement))
        chosen.append(place_heads(picked, placement))
    positions = jnp.full((batch, 1, num_slots), axes.EMPTY, jnp.int32)
    return Body(
        keys=parts[0],
        values=parts[1],
        positions=place_heads(positions, placement),
        fitted=jax.tree.map(jnp.asarray, fitted),
        chosen=(chosen[0], chosen[1]),
        codecs=codecs,
    )


def place_heads(tree: Any, placement: Placement) -> Any:
    """Pins arrays that start `B K` to their place; what follows is on every device of these."""
    tails = {2: "B K", 3: "B K S", 4: KEY_AXES}
    return jax.tree.map(lambda leaf: placement.constrain(leaf, tails[leaf.ndim]), tree)
