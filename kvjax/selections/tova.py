"""TOVA (arXiv 2401.06104): what the last query attends to.

    s_j = A_tj,  t the last query, mean over all query heads of the layer: one set for all heads

The authors evict one token in every step, the newest included; here tokens go in rounds and the window is safe.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.scoring import window_mass
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Selection):
    """Keeps the tokens that the last query attends to."""

    @property
    def num_queries(self) -> int:
        """The last one."""
        return 1

    def score(self, view: View) -> Scores:
        """The same for a token in all heads that hold it."""
        weights = window_mass(view, window=1)
        return sum_over_heads(weights, view.positions) / weights.shape[1]


def sum_over_heads(numbers: Float[Array, "B K S"], positions: Int[Array, "B K S"]) -> Scores:
    """For each slot, the sum of the numbers that all heads have for its token, wherever in their slots it lies."""
    order = jnp.argsort(positions, axis=2)
    sorted_positions = jnp.take_along_axis(positions, order, axis=2)
    sorted_numbers = jnp.take_along_axis(numbers, order, axis=2)

    def of_row(positions: jax.Array, theirs: jax.Array, numbers: jax.Array) -> jax.Array:
        def of_head(theirs: jax.Array, numbers: jax.Array) -> jax.Array:
            places = jnp.minimum(jnp.searchsorted(theirs, positions.reshape(-1)), theirs.shape[0] - 1)
            found = jnp.where(theirs[places] == positions.reshape(-1), numbers[places], 0.0)
            return found.reshape(positions.shape)

        return jnp.sum(jax.vmap(of_head)(theirs, numbers), axis=0)

    return jax.vmap(of_row)(positions, sorted_positions, sorted_numbers)


SELECTIONS.register("tova", TOVA)
