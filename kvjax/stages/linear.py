"""Linear transforms before quantisation: what they are, and random rotations.

Each is a matrix A with orthonormal columns, and all that attention needs follows from it:

    y = x A            what is quantised                 x  `B K S D`
    q . x ~ (q A) . y  the query is transformed once     q  `B T N D`
    sum w x ~ (sum w y) A^T   the output, once           A  `D R`, `K D R` (a head's own) or `B K D R` (a row's own)
"""

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvjax._kernels import transform
from kvjax.errors import UserError
from kvjax.stages.facts import Arrays, LayerFacts
from kvjax.stages.rotation import dense_rotation, hadamard_rotation, is_power_of_two


class Linear(abc.ABC):
    """A transform by a matrix with orthonormal columns."""

    heads: int = 1
    """Neighbouring key/value heads that share one set of R numbers."""

    def fit(self, facts: LayerFacts) -> tuple["Linear", Arrays]:
        """The transform for a layer, its sizes settled, and its arrays, without a batch axis.

        Raises:
          UserError: the head size does not suit it, or it needs statistics and there are none.
        """
        del facts
        return self, {}

    def choose(
        self,
        vectors: Float[Array, "B K S D"],
        valid: Bool[Array, "B S"],
        queries: Float[Array, "B T N D"] | None,
    ) -> Arrays:
        """What is settled by the first tokens that are stored; arrays that start `B K`.

        Args:
          vectors: the first tokens.
          valid: which of them count.
          queries: the prompt's last queries, zeros where there are fewer; None if there was no prompt.
        """
        del vectors, valid, queries
        return {}

    @abc.abstractmethod
    def matrix(self, arrays: Arrays) -> jax.Array | np.ndarray:
        """A."""


@dataclasses.dataclass(frozen=True)
class Rotation(Linear):
    """A random rotation, the same for all heads.

    Attributes:
      kind: "hadamard" (signed) or "dense".
      seed: of the signs, or of the rotation.
      size: D; settled by `fit`.
    """

    kind: str = "hadamard"
    seed: int = 0
    size: int = 0

    def fit(self, facts: LayerFacts) -> tuple["Rotation", Arrays]:
        """Takes the head size, and seeds of their own for each layer and role."""
        size = facts.shape.head_size
        if self.kind == "hadamard" and not is_power_of_two(size):
            raise UserError(
                f"A Hadamard rotation needs a head size that is a power of two, and the model's is {size}: "
                "use rotation=dense."
            )
        seed = (self.seed * 4096 + facts.layer) * 2 + (facts.role == "values")
        return dataclasses.replace(self, size=size, seed=seed), {}

    def matrix(self, arrays: Arrays) -> np.ndarray:
        """`D D`."""
        del arrays
        return rotation(self.kind, self.size, self.seed).T


def rotation(kind: str, size: int, seed: int) -> np.ndarray:
    """The rotation y = Q x of that kind, `size size`."""
    return hadamard_rotation(size, seed) if kind == "hadamard" else dense_rotation(size, seed)


def _rows_of(matrix: jax.Array | np.ndarray, num_kv_heads: int) -> jax.Array:
    """A as `B|1 K D R`."""
    wide = jnp.asarray(matrix, jnp.float32)
    if wide.ndim == 2:
        wide = jnp.broadcast_to(wide, (num_kv_heads, *wide.shape))
    return wide if wide.ndim == 4 else wide[None]


def forward(vectors: Float[Array, "B K S D"], matrix: jax.Array | np.ndarray, *, heads: int) -> jax.Array:
    """Y = x A, summed over `heads` neighbouring heads: `B K/heads S R`."""
    batch, num_kv_heads, num_slots, _ = vectors.shape
    by_head = transform(vectors, jnp.asarray(matrix, jnp.float32))
    if heads == 1:
        return by_head
    return jnp.sum(by_head.reshape(batch, num_kv_heads // heads, heads, num_slots, -1), axis=2)


def backward(numbers: Float[Array, "B k S R"], matrix: jax.Array | np.ndarray, *, heads: int) -> jax.Array:
    """X = y A^T for each head: `B K S D`."""
    if matrix.ndim == 2:
        return jnp.matmul(numbers, matrix.T, precision=jax.lax.Precision.HIGHEST)
    wide = _rows_of(matrix, numbers.shape[1] * heads)
    repeated = jnp.repeat(numbers, heads, axis=1)
    columns = jnp.broadcast_to(wide, (numbers.shape[0], *wide.shape[1:]))
    return jnp.einsum("BKSR,BKDR->BKSD", repeated, columns, precision=jax.lax.Precision.HIGHEST)


def transform_queries(
    queries: Float[Array, "B T N D"], matrix: jax.Array | np.ndarray, *, transposed: bool = False, num_kv_heads: int
) -> jax.Array:
    """Q A for each query head with its key/value head's A, or o A^T for outputs."""
    wide = _rows_of(matrix, num_kv_heads)
    wide = jnp.swapaxes(wide, -1, -2) if transposed else wide
    batch, num_tokens, num_heads, size = queries.shape
    grouped = queries.astype(jnp.float32).reshape(batch, num_tokens, num_kv_heads, -1, size)
    columns = jnp.broadcast_to(wide, (batch, *wide.shape[1:]))
    turned = jnp.einsum("BTKGD,BKDR->BTKGR", grouped, columns, precision=jax.lax.Precision.HIGHEST)
    return turned.reshape(batch, num_tokens, num_heads, -1)
