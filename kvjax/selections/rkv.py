"""R-KV (arXiv 2505.24133): tokens that the last queries attend to, and that do not repeat others.

    I_j = maxpool( mean over the last w queries of softmax_j( max over the group of q_i . k_j / sqrt(D) ) )
    R_j = softmax_j( mean_i C_ij ),  C the cosines of the keys, 0 on the diagonal, and in every row the newest of those
          above the threshold set to 0: of repeated tokens the newest counts as no repetition
    s_j = lambda I_j - (1 - lambda) R_j

Cosines are walked in blocks of rows; no S x S matrix is laid out. The authors' code takes row 0's redundancy for all.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.errors import check_between, check_choice
from kvjax.scoring import before_window, by_group, pooled, window_logits
from kvjax.selection import SELECTIONS, Scores, Selection, View

_BLOCK = 128  # rows of cosines at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKV(Selection):
    """Keeps tokens that matter and are not redundant.

    Attributes:
      queries: w, last queries that vote.
      kernel: tokens that are smoothed together, odd.
      weight: lambda, of importance against redundancy.
      threshold: cosine above which two keys say the same.
    """

    queries: int = 8
    kernel: int = 7
    weight: float = 0.1
    threshold: float = 0.5

    def __post_init__(self):
        check_between("rkv(queries)", self.queries, 1, 1024)
        check_choice("rkv(kernel)", self.kernel, range(1, 64, 2))
        check_between("rkv(weight)", self.weight, 0.0, 1.0)
        check_between("rkv(threshold)", self.threshold, -1.0, 1.0)

    @property
    def num_queries(self) -> int:
        """W."""
        return self.queries

    def score(self, view: View) -> Scores:
        """Importance less redundancy; tokens of the window of queries take no part."""
        before, heard = before_window(view, window=self.queries)
        importance = self._importance(view, before, heard)
        redundancy = jax.nn.softmax(
            jnp.where(before, mean_cosines(view.keys, view.positions, before, self.threshold), -jnp.inf), axis=2
        )
        return jnp.where(before, self.weight * importance - (1 - self.weight) * redundancy, 0.0)

    def _importance(self, view: View, before: Bool[Array, "B K S"], heard: Int[Array, "B"]) -> Scores:
        logits = jnp.max(by_group(window_logits(view, view.queries), view), axis=2)  # B K w S
        weights = jax.nn.softmax(jnp.where(before[:, :, None], logits, -1e30), axis=-1)
        asked = (view.query_positions >= 0)[:, None, :, None]
        weights = jnp.where(asked & before[:, :, None], weights, 0.0)
        mean = jnp.sum(weights, axis=2) / jnp.maximum(heard, 1).astype(jnp.float32)[:, None, None]
        return pooled(mean, view.positions, before, kernel=self.kernel, kind="max")


def mean_cosines(
    keys: Float[Array, "B K S D"], positions: Int[Array, "B K S"], counted: Bool[Array, "B K S"], threshold: float
) -> Scores:
    """Mean over the tokens that count of each token's cosine to them, the exceptions above taken out."""
    directions = keys / (jnp.linalg.norm(keys, axis=3, keepdims=True) + 1e-8)
    directions = jnp.where(counted[..., None], directions, 0.0)
    num_slots = keys.shape[2]
    padding = -num_slots % _BLOCK
    rows = jnp.pad(directions, ((0, 0), (0, 0), (0, padding), (0, 0)))
    slots = jnp.arange(num_slots, dtype=jnp.int32)

    def step(start: jax.Array, total: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, start * _BLOCK, _BLOCK, axis=2)
        cosines = jnp.einsum("BKRD,BKSD->BKRS", block, directions)
        own = (start * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32))[:, None] == slots[None]
        cosines = jnp.where(own, 0.0, cosines)
        ages = positions[:, :, None]
        newest = jnp.max(jnp.where((cosines > threshold) & counted[:, :, None], ages, -1), axis=3, keepdims=True)
        return total + jnp.sum(jnp.where((ages == newest) & (newest >= 0), 0.0, cosines), axis=2)

    total = jax.lax.fori_loop(0, rows.shape[2] // _BLOCK, step, jnp.zeros(keys.shape[:3], jnp.float32))
    return total / jnp.maximum(jnp.sum(counted, axis=2, keepdims=True), 1).astype(jnp.float32)


SELECTIONS.register("rkv", RKV)
