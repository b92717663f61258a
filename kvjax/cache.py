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
          positions [B 1 S]        [B K S] where heads keep different tokens; -1 = empty slot
          owners    [B 1 S]        only where heads share one pool of slots: the head that a slot belongs to
        state    Evidence          what the selection gathers (kvjax/evidence.py); None without one
      num_pinned [B]               tokens of the prompt that stay, whatever their score

There is no length, mask or validity array: all three follow from positions. What lies in an empty slot cannot matter.
A cache is an argument and a result, never a module's variable; every update returns a new one, and the compiled steps
donate the old one, so that its buffers are updated in place. How tokens move is in `kvjax/rounds.py`.
"""

import dataclasses
import functools
from typing import Any

import jax

from kvjax.codec import Codec
from kvjax.model_shape import ModelShape
from kvjax.policy import BodyPlan, Policy
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays

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
    data_fields=("keys", "values", "positions", "owners", "fitted", "chosen"),
    meta_fields=("codecs",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """Coded tokens.

    Attributes:
      keys: parts, `B K S...`.
      values: parts.
      positions: `B 1 S` int32, ascending along S up to the -1 of empty slots, where all tokens stay; `B K S` where a
        selection keeps some of them, in any order.
      owners: None; `B 1 S` int32 in a pool that heads share, each slot's head.
      fitted: arrays of the two codecs that belong to the layer, without a batch axis.
      chosen: arrays that a row's first stored tokens settled, `B K ...`; without meaning while the row's body is empty.
      codecs: of keys and of values, fitted (static).
    """

    keys: Any
    values: Any
    positions: Any
    owners: Any
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Which layer a cache is of, and what it is to hold.

    Attributes:
      index: of the layer.
      shape: of the model.
      policy: of the cache.
      plan: sizes of the layer's body.
      max_tokens: of the cache.
    """

    index: int
    shape: ModelShape
    policy: Policy
    plan: BodyPlan
    max_tokens: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("exact", "body", "state", "prompt"),
    meta_fields=("site",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The cache of one layer.

    Attributes:
      exact: tokens in the model's dtype.
      body: coded tokens, or None.
      state: `Evidence` of the selection, or None.
      prompt: `PromptTokens` while a prefill waits for other layers before it stores them; None at all other times.
      site: which layer it is (static).
    """

    exact: Any
    site: Site
    body: Any = None
    state: Any = None
    prompt: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "num_seen", "num_pinned"),
    meta_fields=("policy", "shape", "max_tokens", "placement"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The cache of a batch of sequences.

    Attributes:
      layers: one `LayerCache` a layer; capacities may differ.
      num_seen: `B` int32, tokens seen by each sequence.
      num_pinned: `B` int32, tokens from the sequence's start that are never evicted (`prompt(...)` in the policy).
      policy: what is kept (static).
      shape: facts of the model (static).
      max_tokens: tokens that a sequence may see in all (static).
      placement: where the arrays live (static).
    """

    layers: Any
    num_seen: Any
    num_pinned: Any
    policy: Policy
    shape: ModelShape
    max_tokens: int
    placement: Placement


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("keys", "values", "positions", "numbers", "last_queries", "replayed"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """A whole prompt, uncompressed, that a layer has yet to store.

    Attributes:
      keys: `B K T D`, rotated.
      values: `B K T D`.
      positions: `B T`; -1 on the right is padding.
      numbers: evidence gathered for its tokens, name -> `B K T` float32.
      last_queries: the prompt's last ones, zeros where a row has fewer, `B 32 N D`; codecs may look at them.
      replayed: position of the first token that is being read again, scalar int32.
    """

    keys: Any
    values: Any
    positions: Any
    numbers: Any
    last_queries: Any
    replayed: Any = 0


def place_heads(tree: Any, placement: Placement) -> Any:
    """Pins arrays that start `B K` to their place; what follows is on every device of these."""
    tails = {2: "B K", 3: "B K S", 4: KEY_AXES}
    return jax.tree.map(lambda leaf: placement.constrain(leaf, tails[leaf.ndim]), tree)
