"""TurboQuant's "prod" quantiser: levels with one bit fewer, and a sign sketch of what they leave.

    r = x - x^,   stored: sign(S r) and |r|;   read: x~ = x^ + sqrt(pi/2)/R |r| S^T sign(S r)

(arXiv 2504.19874, section 3.2; QJL, 2406.03482.) Products with it are unbiased. For attention it is worse than spending
the same bit on levels: the variance is 5 times as large with a Gaussian S and twice with an orthogonal one, and a
softmax feels variance. It is here for comparison.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax._kernels import Coded, Parts, pack, read_parts, to_scale
from kvjax.stages.quantise import Basis, Numbers, Quantiser, transformed
from kvjax.stages.rotation import dense_rotation


@dataclasses.dataclass(frozen=True)
class Sketch(Quantiser):
    """Levels and a sketch of the residual.

    Attributes:
      levels: quantiser of the numbers, with one bit fewer than the whole; None for the sketch alone (1 bit).
      gaussian: whether S has independent normal entries (the paper's); else it is orthogonal times sqrt(R).
      seed: of S.
    """

    levels: Quantiser | None
    gaussian: bool = True
    seed: int = 0

    def projection(self, size: int) -> np.ndarray:
        """S, `R R` float32."""
        if self.gaussian:
            return np.random.default_rng((self.seed, 1)).normal(size=(size, size)).astype(np.float32)
        return (dense_rotation(size, self.seed + (1 << 31)) * np.sqrt(size)).astype(np.float32)

    def encode(self, numbers: Numbers, basis: Basis = None, *, mesh: Mesh | None = None) -> Parts:
        """The parts of the levels, then the signs."""
        numbers = transformed(numbers, basis)
        parts = () if self.levels is None else self.levels.encode(numbers, mesh=mesh)
        rest = numbers - read_parts(parts) if parts else numbers
        size = numbers.shape[-1]
        signs = jnp.where(rest @ self.projection(size).T >= 0, 0, -1)  # codes 0 and -1 stand for +1 and -1
        # E[S^T sign(S r)] = sqrt(2/pi) R r/|r| for normal rows; for an orthogonal S the factor differs in order 1/R.
        scale = jnp.linalg.norm(rest, axis=-1) * (np.sqrt(np.pi / 2) / size)
        return (*parts, Coded(planes=pack(signs, 1), scale=to_scale(scale), bits=1, levels=(-1.0, 1.0)))

    def expand_queries(self, queries: jax.Array) -> jax.Array:
        """The query for the levels, and its projection for the signs."""
        projected = queries @ self.projection(queries.shape[-1]).T
        return projected if self.levels is None else jnp.concatenate([queries, projected], axis=-1)

    def collapse(self, outputs: jax.Array) -> jax.Array:
        """Sums of levels plus sums of signs, projected back."""
        if self.levels is None:
            return outputs @ self.projection(outputs.shape[-1])
        size = outputs.shape[-1] // 2
        return outputs[..., :size] + outputs[..., size:] @ self.projection(size)
