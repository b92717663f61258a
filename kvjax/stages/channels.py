"""Linear transforms that choose among a head's channels by the first tokens stored: ThinK's, and outliers apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy import linalg

from kvjax.stages.facts import Arrays, LayerFacts
from kvjax.stages.linear import Linear, rotation
from kvjax.stages.rotation import is_power_of_two


@dataclasses.dataclass(frozen=True)
class Prune(Linear):
    """ThinK (arXiv 2407.21018): drops key channels that matter least to the prompt's last queries.

        score_d = mean over the last queries of q_d^2 (summed over the heads that share a key)  x  mean of k_d^2

    Attributes:
      ratio: share of the channels that is dropped, in [0, 1).
      rank: channels kept; settled by `fit`.
      size: D; settled by `fit`.
    """

    ratio: float = 0.5
    rank: int = 0
    size: int = 0

    def fit(self, facts: LayerFacts) -> tuple["Prune", Arrays]:
        """Takes the head size."""
        size = facts.shape.head_size
        return dataclasses.replace(self, rank=size - int(size * self.ratio), size=size), {}

    def choose(
        self,
        vectors: Float[Array, "B K S D"],
        valid: Bool[Array, "B S"],
        queries: Float[Array, "B T N D"] | None,
    ) -> Arrays:
        """The channels that are kept, ascending."""
        score = mean_square(vectors, valid)  # B K D
        if queries is not None:
            batch, num_kv_heads = vectors.shape[:2]
            grouped = queries.astype(jnp.float32).reshape(batch, queries.shape[1], num_kv_heads, -1, vectors.shape[3])
            score = score * jnp.sum(jnp.square(grouped), axis=(1, 3))
        kept = jax.lax.top_k(score, self.rank)[1]
        return {"channels": jnp.sort(kept, axis=-1)}

    def matrix(self, arrays: Arrays) -> jax.Array:
        """`B K D R`, a one in each column."""
        return one_hot_columns(arrays["channels"], self.size)


@dataclasses.dataclass(frozen=True)
class Outliers(Linear):
    """Puts the channels with the largest second moments first and rotates them and the others apart.

    Attributes:
      share: one channel in this many counts as an outlier.
      kind: of both rotations; "hadamard" only where a size allows it, else dense.
      seed: of both.
      size: D; settled by `fit`.
    """

    share: int = 4
    kind: str = "hadamard"
    seed: int = 0
    size: int = 0

    def fit(self, facts: LayerFacts) -> tuple["Outliers", Arrays]:
        """Takes the head size."""
        return dataclasses.replace(self, size=facts.shape.head_size), {}

    def choose(
        self,
        vectors: Float[Array, "B K S D"],
        valid: Bool[Array, "B S"],
        queries: Float[Array, "B T N D"] | None,
    ) -> Arrays:
        """All channels, outliers first, each group ascending."""
        del queries
        order = jax.lax.top_k(mean_square(vectors, valid), self.size)[1]
        groups = (order[..., : self.size // self.share], order[..., self.size // self.share :])
        return {"channels": jnp.concatenate([jnp.sort(group, axis=-1) for group in groups], axis=-1)}

    def matrix(self, arrays: Arrays) -> jax.Array:
        """`B K D D`."""
        widths = (self.size // self.share, self.size - self.size // self.share)
        kinds = [self.kind if is_power_of_two(width) else "dense" for width in widths]
        blocks = [
            rotation(kind, width, 2 * self.seed + index).T
            for index, (kind, width) in enumerate(zip(kinds, widths, strict=True))
        ]
        return one_hot_columns(arrays["channels"], self.size) @ linalg.block_diag(*blocks).astype(np.float32)


def mean_square(vectors: Float[Array, "B K S D"], valid: Bool[Array, "B S"]) -> Float[Array, "B K D"]:
    """Mean over the valid slots of each number's square."""
    counted = jnp.where(valid[:, None, :, None], jnp.square(vectors), 0.0)
    return jnp.sum(counted, axis=2) / jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None, None].astype(jnp.float32)


def one_hot_columns(channels: jax.Array, size: int) -> Float[Array, "B K D R"]:
    """A matrix that picks channels."""
    return jnp.swapaxes(jax.nn.one_hot(channels, size, dtype=jnp.float32), -1, -2)
