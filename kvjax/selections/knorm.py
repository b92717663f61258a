"""Key norms (arXiv 2406.11430): keys of small norm draw attention.

s_j = -|k_j|
"""

import dataclasses

import jax.numpy as jnp

from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class KNorm(Selection):
    """Keeps the tokens with the smallest keys."""

    def score(self, view: View) -> Scores:
        """Smaller is higher."""
        return -view.of_each_key(lambda keys: jnp.linalg.norm(keys, axis=3))


SELECTIONS.register("knorm", KNorm)
