"""KeyDiff (arXiv 2504.15364): keys that differ from the others.

a = mean_j k_j / |k_j|        over the tokens held, for each key/value head
s_j = -cos(k_j, a)
"""

import dataclasses

import jax.numpy as jnp

from kvjax.scoring import mean_over
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Selection):
    """Keeps the tokens whose keys point away from the mean direction."""

    def score(self, view: View) -> Scores:
        """Minus the cosine to the mean direction."""
        directions = view.keys / jnp.maximum(jnp.linalg.norm(view.keys, axis=3, keepdims=True), 1e-12)
        anchor = mean_over(directions, view.held)  # B K D
        anchor = anchor / jnp.maximum(jnp.linalg.norm(anchor, axis=2, keepdims=True), 1e-12)
        return -jnp.einsum("BKSD,BKD->BKS", directions, anchor)


SELECTIONS.register("keydiff", KeyDiff)
