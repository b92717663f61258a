"""Policies: what a cache keeps, and how. A policy is static and hashable; people type it as a string.

    full                                              every token in the model's dtype
    int8                                              one codec for keys and values
    turboquant(bits=4)+exact(sinks=4,window=128)      with the tokens that stay exact
    key(turboquant,bits=4)+value(int4)+edges(2)       codecs apart; the first and last two layers uncompressed
    int2+int4(part=1/2)                               the first half of the layers has another codec
    snapkv(budget=1024)+int4                          a selection: the tokens that matter, and a codec for them
    h2o(budget=512)+layers(pyramid)+heads(adaptive)   budgets that differ between layers and heads
    triattention(budget=512)+prompt(2048)             a prompt of up to 2,048 tokens stays, on top of the budget

How the string is read is in `kvjax/grammar.py`. This module says what a policy comes to: how many slots a layer has,
and how many tokens a head keeps.
"""

import dataclasses
import math

from kvjax.codec import Codec, ExactSizes
from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.selection import Selection

FULL = {"keys": Codec(role="keys"), "values": Codec(role="values")}
"""Codecs that store the model's dtype."""

SCHEDULES = ("uniform", "pyramid", "given")
HEADS = ("uniform", "adaptive")

_NEXT_TO_NOTHING = 1.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """How budgets spread over layers.

    Attributes:
      kind: one of `SCHEDULES`.
      beta: of the pyramid: the last layer's body gets 1 / beta of the mean (arXiv 2406.02069).
      budgets: given ones, one a layer.
    """

    kind: str = "uniform"
    beta: float = 20.0
    budgets: tuple[int, ...] = ()

    def spread(self, mean: int, index: int, count: int) -> int:
        """What layer `index` of `count` gets where each gets `mean` on average; all together get mean times count.

        The pyramid falls in equal steps from 2 mean - mean / beta to mean / beta.
        """
        if self.kind != "pyramid" or count == 1:
            return mean
        low = mean / self.beta
        high = 2 * mean - low

        def up_to(layers: int) -> int:
            total = layers * high - (high - low) * layers * (layers - 1) / (2 * (count - 1))
            return round(total)

        return up_to(index + 1) - up_to(index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
    """How a layer's budget spreads over its key/value heads.

    Attributes:
      kind: "uniform", or "adaptive": scores compete across the heads of a layer for one pool of slots.
      floor: share of an even budget that each head gets first (arXiv 2407.11550).
    """

    kind: str = "uniform"
    floor: float = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PinnedPrompt:
    """Prompts that are never evicted.

    Attributes:
      tokens: longest prompt that there is room for, on top of the budget.
      inside: True counts the prompt inside the budget, and makes no room.
    """

    tokens: int = 0
    inside: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class BodyPlan:
    """Sizes of one layer's body.

    Attributes:
      slots: capacity, of all heads together in a pool.
      quota: tokens that a head keeps at most in it (on average in a pool), a pinned prompt apart.
      pooled: whether heads share one pool.
      unit: neighbouring slots that are kept or dropped together.
    """

    slots: int
    quota: int
    pooled: bool = False
    unit: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How a cache keeps its tokens.

    Attributes:
      keys: codec of the keys in the body.
      values: codec of the values.
      parts: codecs of keys and of values for equal parts of the layers, the first part first; none where one serves
        all layers. `keys` and `values` are then the first part's.
      exact: sizes of the segment that stays in the model's dtype.
      edges: first and last layers whose body stays in the model's dtype, with all tokens.
      selection: which tokens stay; None keeps all.
      layers: how budgets spread over layers.
      heads: how they spread over the heads of a layer.
      prompt: pinned prompts, or None.
      outliers: share of a head's budget kept for the values of largest norm.
      text: the policy as people type it.
    """

    keys: Codec = FULL["keys"]
    values: Codec = FULL["values"]
    parts: tuple[tuple[Codec, ...], tuple[Codec, ...]] = ((), ())
    exact: ExactSizes = ExactSizes(sinks=0, window=0)
    edges: int = 0
    selection: Selection | None = None
    layers: Layers = Layers()
    heads: Heads = Heads()
    prompt: PinnedPrompt | None = None
    outliers: float = 0.0
    text: str = "full"

    def codecs(self, layer: int, num_layers: int) -> tuple[Codec, Codec]:
        """Codecs of keys and values for a layer.

        Raises:
          UserError: the edges take in all layers, or there are more parts than layers.
        """
        if not self._is_inner(layer, num_layers):
            return FULL["keys"], FULL["values"]
        inner = num_layers - 2 * self.edges
        if (most := max(map(len, self.parts))) > inner:
            raise UserError(
                f"The policy '{self}' parts layers by {most}, and the model has {inner} to compress: use at most that."
            )
        index = layer - self.edges
        keys, values = (part[index * len(part) // inner] if part else None for part in self.parts)
        return keys or self.keys, values or self.values

    @property
    def all_codecs(self) -> tuple[Codec, ...]:
        """The codecs of all parts of the layers, of keys and of values."""
        return (self.keys, self.values, *self.parts[0], *self.parts[1])

    def selection_of(self, layer: int, num_layers: int) -> Selection | None:
        """The selection for a layer; None where all tokens stay."""
        return self.selection if self._is_inner(layer, num_layers) else None

    def _is_inner(self, layer: int, num_layers: int) -> bool:
        if self.edges and 2 * self.edges >= num_layers:
            most = (num_layers - 1) // 2
            raise UserError(
                f"edges({self.edges}) leaves none of the model's {num_layers} layers to compress; it must be at most "
                f"{most}."
            )
        return self.edges <= layer < num_layers - self.edges

    @property
    def evicts(self) -> bool:
        """Whether tokens are ever dropped."""
        return self.selection is not None and not self.selection.page

    def body_slots(self, max_tokens: int) -> int:
        """Slots for all tokens of a row of `max_tokens`: what the exact segment cannot hold, in whole rounds."""
        beyond = max(max_tokens - self.exact.sinks - self.exact.window - self.exact.round, 0)
        return math.ceil(beyond / self.exact.round) * self.exact.round

    def plan(self, layer: int, *, shape: ModelShape, max_tokens: int) -> BodyPlan:
        """Sizes of a layer's body.

        Raises:
          UserError: the budget is smaller than what is protected, or the given budgets are not one a layer.
        """
        whole = self.body_slots(max_tokens)
        unit = math.lcm(*(codec.granule for codec in self.all_codecs))
        if not self.evicts or not self._is_inner(layer, shape.num_layers) or not whole:
            # Whole tiles of 8 groups, where that adds next to nothing: kernels on TPUs take others after a copy.
            tile = math.lcm(8 * unit, self.selection.page if self.selection and self.selection.page else 1)
            tiles = math.ceil(whole / tile) * tile
            return BodyPlan(slots=tiles if tiles <= whole * _NEXT_TO_NOTHING else whole, quota=whole)
        quota = min(self._quota(layer, shape.num_layers, max_tokens), whole) // unit * unit
        pinned, pooled = self.prompt.tokens if self.prompt else 0, self.heads.kind == "adaptive"
        aligned = math.lcm(unit, 8)  # packed codes fill whole bytes
        wanted = quota + pinned
        if pooled:
            heads = shape.num_kv_heads
            pinned = math.ceil(pinned / unit) * unit  # each head pins whole units
            wanted = math.ceil(quota * heads * self.selection.head_share(layer)) + pinned * heads
            whole *= heads
        slots = max(min(math.ceil(wanted / aligned) * aligned, whole), aligned)
        return BodyPlan(slots=slots, quota=quota, pooled=pooled, unit=unit)

    def most_pinned(self, *, shape: ModelShape, max_tokens: int) -> int | None:
        """The longest prompt that can be pinned; None where prompts are not pinned."""
        if self.prompt is None:
            return None
        if not self.body_slots(max_tokens):
            return max_tokens  # nothing is ever evicted
        if not self.prompt.inside:
            return self.prompt.tokens
        layers = [layer for layer in range(shape.num_layers) if self._is_inner(layer, shape.num_layers)]
        quotas = [self.plan(layer, shape=shape, max_tokens=max_tokens).quota for layer in layers]
        return self.exact.sinks + min(quotas)

    def _quota(self, layer: int, num_layers: int, max_tokens: int) -> int:
        """Tokens in the body of one head."""
        protected = self.exact.sinks + self.exact.window
        budget, given = self.selection.tokens(max_tokens), self.layers.budgets
        if given and len(given) != num_layers:
            listed = ",".join(map(str, given))
            raise UserError(f"layers({listed}) has {len(given)} budgets; the model has {num_layers} layers.")
        budget = given[layer] if given else budget
        self._check_budget(budget)
        inner = num_layers - 2 * self.edges
        return self.layers.spread(budget - protected, layer - self.edges, inner)

    def check(self) -> None:
        """Raises `UserError` for terms that cannot go together, with the reason and the nearest that can."""
        selection, pooled = self.selection, self.heads.kind == "adaptive"
        if selection is None:
            return
        given = self.layers.budgets[self.edges : len(self.layers.budgets) - self.edges] or (selection.budget,)
        for budget in (budget for budget in given if isinstance(budget, int)):
            self._check_budget(budget)
        if selection.page and (pooled or self.layers.kind != "uniform" or self.prompt or self.outliers):
            raise UserError(
                "This selection keeps all tokens and chooses what is read: leave out layers, heads, prompt and protect."
            )
        if selection.needs_pool and not pooled:
            raise UserError("This selection gives whole heads to a pool: it needs heads(adaptive), its default.")
        if selection.needs_pool and self.prompt and self.prompt.inside:
            raise UserError("Heads that keep nothing cannot hold a prompt inside their budget: use prompt(N).")
        if selection.page and max(codec.stored_heads for codec in self.all_codecs) > 1:
            raise UserError(
                "Each head reads pages of its own, and this codec stores several heads as one: use one with heads=1."
            )
        if selection.replay and self.edges:
            raise UserError("A selection that reads the prompt twice needs all layers: leave out edges.")
        if selection.shares != "none":
            terms = {"heads(adaptive)": pooled, "layers": self.layers.kind != "uniform", "edges": self.edges > 0}
            terms["protect"] = self.outliers > 0
            for name in (name for name, given in terms.items() if given):
                raise UserError(
                    f"A selection whose layers agree on one set of tokens cannot have {name}: leave it out, or let "
                    "each layer choose for itself (mode=layer)."
                )
        for codec in self.all_codecs:
            if pooled and codec.mixes_heads:
                raise UserError(
                    f"heads(adaptive) keeps different tokens for each head in one pool, and this codec of {codec.role} "
                    "joins heads or turns keys as it reads them: use heads(uniform), or a codec with heads=1 and "
                    "rope=post."
                )

    def _check_budget(self, budget: int) -> None:
        protected = self.exact.sinks + self.exact.window
        if budget < protected:
            raise UserError(
                f"A budget of {budget} tokens is smaller than what is protected: exact(sinks={self.exact.sinks},"
                f"window={self.exact.window}) takes {protected} of it. Give at least {protected}, or a smaller segment."
            )

    def __str__(self) -> str:
        return self.text
