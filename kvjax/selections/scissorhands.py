"""Scissorhands (arXiv 2305.17118): tokens that attention has passed over go.

    s_j = -(queries i that gave j less than 1 / (tokens that i saw)) / (queries that saw j)        mean over the group

The authors count over a history of 400 steps; here counts run over a token's whole life, as a share of it, so that
young tokens are not favoured by having had less time to be passed over.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands(Selection):
    """Keeps the tokens that are seldom given less than their even share of attention."""

    numbers: ClassVar[tuple[str, ...]] = ("low",)

    def score(self, view: View) -> Scores:
        """Minus the share of queries."""
        queries = jnp.maximum(view.num_seen[:, None, None] - view.positions, 1)
        return -view.numbers["low"] / queries.astype(jnp.float32)


SELECTIONS.register("scissorhands", Scissorhands)
