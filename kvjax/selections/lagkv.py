"""LagKV (arXiv 2504.04704): tokens that stand out against the tokens that follow.

The tokens after the sinks are cut into chunks of `lag`. With the lowest and highest number of each channel in the
*next* chunk,

    x'_j = (x_j - low) / (high - low)        s_j = softmax over the chunk of std over channels of x'_j

for keys and for values; the score is their mean. Tokens of the last whole chunk and of what follows have nothing to be
compared with, and stay. Scores are compared within a chunk alone: a token's score is its rank in its chunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.errors import check_between
from kvjax.scoring import in_order
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class LagKV(Selection):
    """Keeps the tokens that stand out against those that follow.

    Attributes:
      lag: tokens of a chunk.
    """

    lag: int = 128

    def __post_init__(self):
        check_between("lagkv(lag)", self.lag, 2, 1 << 20)

    def score(self, view: View) -> Scores:
        """Ranks within chunks, in (0, 1]; 1 for the last ones."""
        lag, num_slots = self.lag, view.positions.shape[2]
        if num_slots < lag:
            return jnp.ones(view.positions.shape, jnp.float32)
        counted = view.held & (view.positions >= jnp.min(jnp.where(view.scorable, view.positions, 2**30), 2)[..., None])
        order, places = in_order(view.positions, counted)
        spans = [self._spans(numbers, order) for numbers in (view.keys, view.values)]
        mean = (spans[0] + spans[1]) / 2  # B K chunks lag
        ranks = jnp.argsort(jnp.argsort(mean, axis=-1), axis=-1).astype(jnp.float32) + 1.0
        flat = (ranks / lag).reshape(*mean.shape[:2], -1)
        flat = jnp.pad(flat, ((0, 0), (0, 0), (0, num_slots - flat.shape[2])), constant_values=1.0)
        whole = jnp.sum(counted, axis=2, keepdims=True) // lag  # chunks of each head
        followed = jnp.arange(num_slots, dtype=jnp.int32)[None, None] < (whole - 1) * lag
        scores = jnp.take_along_axis(jnp.where(followed, flat, 1.0), places, axis=2)
        return jnp.where(counted, scores, 1.0)

    def _spans(self, numbers: Float[Array, "B K S D"], order: Int[Array, "B K S"]) -> Float[Array, "B K chunks lag"]:
        """Softmax over each chunk of the spread over channels, after scaling by the next chunk's range."""
        lag = self.lag
        together = jax.vmap(jax.vmap(lambda row, order: row[order]))(numbers, order)
        chunks = together.shape[2] // lag
        cut = together[:, :, : chunks * lag].reshape(*together.shape[:2], chunks, lag, -1)
        low, high = jnp.min(cut, axis=3, keepdims=True), jnp.max(cut, axis=3, keepdims=True)
        low, high = jnp.roll(low, -1, axis=2), jnp.roll(high, -1, axis=2)
        scaled = (cut - low) / jnp.where(high > low, high - low, 1.0)
        return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)


SELECTIONS.register("lagkv", LagKV)
