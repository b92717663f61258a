"""CriticalKV (arXiv 2502.03805): a second look at what another selection keeps, by what values do to the output.

    1. the best half of the budget by the base's score s_j stays
    2. the rest of the budget goes to the best by (s_j + epsilon) |W_O v_j|_1        mean over the group

The norms are taken once, when a token comes; it is what the output projection of each query head makes of its value. As
in kvpress, a base's score is taken as it is: the second stage means something for bases whose scores are weights.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax._kernels import select
from kvjax.errors import UserError, check_between, unknown
from kvjax.selection import SELECTIONS, Scores, Selection, View
from kvjax.stages.facts import Arrays, LayerFacts

_FIRST = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalKV(Selection):
    """Another selection's scores, the second half of the budget weighted by output norms.

    Attributes:
      base: name of the other selection, with its default arguments.
      ratio: share of the budget that goes by the base's score alone.
      epsilon: added to the base's score.
      inner: the other selection; settled from `base`.
    """

    base: str = "snapkv"
    ratio: float = 0.5
    epsilon: float = _FIRST
    inner: Any = None

    def __post_init__(self):
        check_between("criticalkv(ratio)", self.ratio, 0.0, 1.0)
        check_between("criticalkv(epsilon)", self.epsilon, 0.0, 1e6)
        if self.inner is not None:
            return
        if self.base not in SELECTIONS.names():
            raise unknown("selection criticalkv(base)", self.base, SELECTIONS.names())
        inner = SELECTIONS.get(self.base)(budget=self.budget)
        if inner.page or inner.waits or isinstance(inner, CriticalKV):
            raise UserError(
                f"criticalkv(base={self.base}): this selection gives no scores of its own in every round; the nearest "
                "that does is snapkv."
            )
        object.__setattr__(self, "inner", inner)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Those of the base, and the strength of values."""
        return (*self.inner.numbers, "strength")

    @property
    def wants_moments(self) -> bool:
        """As the base."""
        return self.inner.wants_moments

    @property
    def num_queries(self) -> int:
        """As the base."""
        return self.inner.num_queries

    @property
    def heads(self) -> str:
        """As the base."""
        return self.inner.heads

    @property
    def needs_pool(self) -> bool:
        """As the base."""
        return self.inner.needs_pool

    @property
    def schedule(self) -> str:
        """As the base."""
        return self.inner.schedule

    def head_share(self, layer: int) -> float:
        """As the base."""
        return self.inner.head_share(layer)

    def fit(self, facts: LayerFacts) -> tuple[Selection, Arrays]:
        """Fits the base."""
        inner, arrays = self.inner.fit(facts)
        return dataclasses.replace(self, inner=inner, layer=facts.layer), arrays

    def score(self, view: View) -> Scores:
        """The second stage's score."""
        base = self.inner.score(view)
        return jnp.where(base > -jnp.inf, (base + self.epsilon) * view.numbers["strength"], base)

    def favoured(self, view: View, scores: Scores) -> Bool[Array, "B K S"]:
        """The first stage: the best by the base's score."""
        del scores
        base = self.inner.score(view)
        recency = jnp.where(view.scorable, view.positions, -1)
        budgets = jnp.floor(self.ratio * view.quotas.astype(jnp.float32)).astype(jnp.int32)
        none = jnp.zeros_like(view.scorable)
        return select(base, protected=none, recency=recency, budgets=budgets, mesh=view.placement.mesh)


SELECTIONS.register("criticalkv", CriticalKV)
