"""Selections: which tokens stay. A selection scores the tokens that a layer holds; what is kept follows in one place.

    view  ->  score  B K S, higher is kept   ->   select: protected first, then by score, then the newest
                                                  (kvjax/eviction.py, the same for every selection)

A selection is static and hashable, one file in `kvjax/selections/`. It looks at a `View`: keys, values and positions of
all tokens that a layer holds, decoded or as they are stored, and at what it asked to be gathered while they passed:
attention mass, the last queries, moments of queries. What it does not ask for is never computed, and what it does not
look at is left out by the compiler. It never protects anything by a large score: sinks, window and pinned prompt are
not its business.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvjax._kernels import StoredKeys
from kvjax.model_shape import ModelShape
from kvjax.registry import Registry
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays, LayerFacts

SELECTIONS: Registry = Registry("selection", package="kvjax.selections")
"""Name -> subclass of `Selection`; see `kvjax/selections/`."""

DEFAULT_BUDGET = 2048

NUMBERS = ("sum", "peak", "low", "strength")
"""What may be gathered for each token and key/value head while queries pass. The first three are attention masses
(`kernels_pallas/decode_attention`); `strength` is the length, the sum of magnitudes, of what the output projection
makes of the token's value, mean over the query heads that share it."""

Scores = Float[Array, "B K S"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "keys",
        "values",
        "positions",
        "scorable",
        "num_seen",
        "quotas",
        "numbers",
        "queries",
        "query_positions",
        "moments",
        "arrays",
        "stored",
    ),
    meta_fields=("shape", "placement"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """All tokens that a layer holds, in any order, and empty slots anywhere between them.

    Attributes:
      keys: `B K S D` float32, rotated, decoded; zeros in empty slots.
      values: `B K S D` float32, decoded; zeros in empty slots.
      positions: `B K S` int32; -1 is an empty slot.
      scorable: `B K S`, tokens that may go: held and not protected. Statistics over tokens are taken over these.
      num_seen: `B` int32, tokens seen so far: the next one's position.
      quotas: `B K` int32, most scorable tokens of a head that will be kept.
      numbers: what the selection asked for, name -> `B K S` float32; 0 in empty slots.
      queries: `B w N D` float32, rotated, the last ones, oldest first; None if not asked for.
      query_positions: `B w` int32; -1 where a row has had fewer.
      moments: of queries before RoPE, `Moments`; None if not asked for.
      arrays: what the selection was fitted to.
      shape: of the model.
      stored: the keys in pieces along S, as they lie in memory (sinks, body, ring), anything in empty slots; None where
        `keys` is the one piece.
      placement: where arrays live.
    """

    keys: Any
    values: Any
    positions: Any
    scorable: Any
    num_seen: Any
    quotas: Any
    numbers: Any
    queries: Any
    query_positions: Any
    moments: Any
    arrays: Arrays
    shape: ModelShape
    stored: Any = None
    placement: Placement = Placement()

    @property
    def held(self) -> Bool[Array, "B K S"]:
        """Slots with a token."""
        return self.positions >= 0

    @property
    def group(self) -> int:
        """G, query heads of a key/value head."""
        return self.shape.num_query_heads // self.shape.num_kv_heads

    @property
    def pieces(self) -> tuple[StoredKeys, ...]:
        """The keys, piece by piece along S, for those that read them where they lie."""
        return (StoredKeys.of_array(self.keys, self.positions),) if self.stored is None else self.stored

    def of_each_key(self, function: Callable[[Float[Array, "B K _ D"]], Array]) -> Float[Array, "B K ... S"]:
        """What a function makes of each key by itself: `B K s D` -> `B K ... s`, joined to `B K ... S`.

        Empty slots get 0. Keys are read where they lie; joined first, as `keys` has them, they would be copied.
        """
        joined = jnp.concatenate([function(piece.read()) for piece in self.pieces], axis=-1)
        between = (1,) * (joined.ndim - self.held.ndim)
        return jnp.where(self.held.reshape(*self.held.shape[:2], *between, -1), joined, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What every selection has; a subclass adds its arguments, which become those of the policy string.

    Attributes:
      budget: tokens kept per layer and key/value head, sinks and window included; below 1, or 1.0, a share of
        `max_tokens`.
      layer: index of the layer, settled by `fit`.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    """Which of `NUMBERS` it needs; at most one attention mass."""
    wants_moments: ClassVar[bool] = False
    """Whether it needs the moments of a row's queries."""
    heads: ClassVar[str] = "uniform"
    """How budgets spread over heads where the policy says nothing."""
    schedule: ClassVar[str] = "uniform"
    """How budgets spread over layers where the policy says nothing."""
    needs_pool: ClassVar[bool] = False
    """Whether it makes no sense without `heads(adaptive)`."""
    page: ClassVar[int] = 0
    """Tokens of a page, for those that keep all tokens and choose what is read; 0 for those that evict."""

    budget: int | float = DEFAULT_BUDGET
    layer: int = 0

    @property
    def num_queries(self) -> int:
        """How many of the last queries it needs."""
        return 0

    @property
    def replay(self) -> int:
        """Tokens of a prompt that the model reads again together before it is compressed; 0 for once."""
        return 0

    @property
    def waits(self) -> bool:
        """Whether a prompt can be stored only when all layers have seen it."""
        return self.shares != "none" or self.replay > 0

    def tokens(self, max_tokens: int) -> int:
        """The budget in tokens, of rows of `max_tokens`."""
        return round(self.budget * max_tokens) if isinstance(self.budget, float) else self.budget

    @property
    def shares(self) -> str:
        """What agrees on one set of tokens: "none", the same heads of all "layers", or "all" heads of all layers."""
        return "none"

    def head_share(self, layer: int) -> float:
        """Share of a layer's heads that keep tokens in the body at all."""
        del layer
        return 1.0

    def fit(self, facts: LayerFacts) -> tuple["Selection", Arrays]:
        """The selection for one layer, with its fitted arrays.

        Raises:
          UserError: the model does not suit it, or it needs statistics and there are none.
        """
        return dataclasses.replace(self, layer=facts.layer), {}

    def score(self, view: View) -> Scores:
        """Higher is kept; -inf is dropped even where there is room. What empty slots get cannot matter."""
        raise NotImplementedError

    def favoured(self, view: View, scores: Scores) -> Bool[Array, "B K S"] | None:
        """Tokens that are kept before the others by a rule of the method itself; None for no such rule."""
        del view, scores
        return None
