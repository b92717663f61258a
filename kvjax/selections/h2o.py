"""H2O, heavy hitters (arXiv 2306.14048): what attention has gone to so far.

    s_j = sum_i A_ij        over all queries i that have come, mean over the query heads of the group

The authors' code sums over the batch too, and works on query heads; here rows do not touch. `mean=1` divides by the
queries that could see j, which is kvpress's ObservedAttention: older tokens no longer win by age.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.errors import check_choice
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Selection):
    """Keeps the tokens of largest attention mass.

    Attributes:
      mean: 1 for the mean over the queries that could see a token, 0 for the sum.
    """

    numbers: ClassVar[tuple[str, ...]] = ("sum",)

    mean: int = 0

    def __post_init__(self):
        check_choice("h2o(mean)", self.mean, (0, 1))

    def score(self, view: View) -> Scores:
        """The mass, in all or a query."""
        mass = view.numbers["sum"]
        if not self.mean:
            return mass
        queries = view.num_seen[:, None, None] - view.positions
        return mass / jnp.maximum(queries, 1).astype(jnp.float32)


SELECTIONS.register("h2o", H2O)
