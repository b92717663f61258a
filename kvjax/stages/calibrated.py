"""Linear transforms that are fitted to statistics: principal components, and OSCAR's rotation."""

import dataclasses

import jax
import numpy as np
from scipy import linalg

from kvjax.errors import UserError
from kvjax.stages.facts import Arrays, LayerFacts
from kvjax.stages.linear import Linear, rotation
from kvjax.stages.rotation import is_power_of_two


@dataclasses.dataclass(frozen=True)
class Principal(Linear):
    """The directions with the largest second moments (PCA), from statistics.

    Attributes:
      rank: R, numbers kept of `heads` x D; None where `energy` decides.
      energy: share of the second moment that every head's R directions keep, in (0, 1].
      heads: neighbouring heads that share one set of R numbers.
      spread: whether the R numbers are rotated among themselves, so that one scale suits them all.
    """

    rank: int | None = None
    energy: float | None = None
    heads: int = 1
    spread: bool = False

    def fit(self, facts: LayerFacts) -> tuple["Principal", Arrays]:
        """Eigenvectors of the second moments (about the mean where that is taken off)."""
        shape = facts.shape
        if shape.num_kv_heads % self.heads:
            raise UserError(f"heads is {self.heads}; it must divide the model's {shape.num_kv_heads} key/value heads.")
        width = self.heads * shape.head_size
        if self.rank is not None and self.rank > width:
            raise UserError(f"rank is {self.rank}; the vectors have {width} numbers, so it must be at most {width}.")
        moments = facts.moments.second_of(self.heads, centred=facts.centred)  # K/heads width width
        sizes, vectors = np.linalg.eigh(np.asarray(moments, np.float64))
        sizes, vectors = np.maximum(sizes[:, ::-1], 0.0), vectors[:, :, ::-1]
        rank = self.rank
        if rank is None:
            kept = np.cumsum(sizes, axis=1) / np.maximum(np.sum(sizes, axis=1, keepdims=True), 1e-30)
            needed = 1 + np.max(np.sum(kept < self.energy - 1e-9, axis=1))
            rank = min(-(-int(needed) // 8) * 8, width)
        basis = vectors[:, :, :rank]
        if self.spread:
            kind = "hadamard" if is_power_of_two(rank) else "dense"
            basis = basis @ rotation(kind, rank, 2 * facts.layer + (facts.role == "values")).T
        by_head = basis.reshape(shape.num_kv_heads, shape.head_size, rank).astype(np.float32)
        return dataclasses.replace(self, rank=rank, energy=None), {"basis": by_head}

    def matrix(self, arrays: Arrays) -> jax.Array | np.ndarray:
        """`K D R`."""
        return arrays["basis"]


@dataclasses.dataclass(frozen=True)
class QueryCovariance(Linear):
    """OSCAR's rotation U H P (arXiv 2605.17757): eigenvectors, Hadamard, bit reversal, from statistics.

    U holds the eigenvectors, largest first, of what meets the vectors: the queries' second moment for keys; for values
    their own, each token weighted by what the queries make of its key.
    """

    def fit(self, facts: LayerFacts) -> tuple["QueryCovariance", Arrays]:
        """U H P of each head."""
        size = facts.shape.head_size
        if not is_power_of_two(size):
            raise UserError(
                f"oscar needs a head size that is a power of two, and the model's is {size}: use turboquant with "
                "rotation=dense."
            )
        statistics = facts.moments and facts.statistics
        second = statistics.queries_second if facts.role == "keys" else statistics.values_weighted_second
        vectors = np.linalg.eigh(np.asarray(second, np.float64))[1][:, :, ::-1]
        order = np.asarray([int(f"{index:0{size.bit_length() - 1}b}"[::-1], 2) for index in range(size)])
        rotated = vectors @ (linalg.hadamard(size) / np.sqrt(size))[:, order]
        return self, {"basis": rotated.astype(np.float32)}

    def matrix(self, arrays: Arrays) -> jax.Array | np.ndarray:
        """`K D D`."""
        return arrays["basis"]
