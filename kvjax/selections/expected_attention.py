"""Expected attention (arXiv 2510.00636): what queries to come will attend to, from the distribution of those that came.

Queries before RoPE are taken as normal with a mean mu and a covariance Sigma for each query head. R is the mean of the
RoPE rotations over the next `future` positions:

    mu' = R mu,   Sigma' = R Sigma R^T
    z_j = mu' . k_j / sqrt(D) + k_j^T Sigma' k_j / (2 D)
    s_j = ( mean over the group of softmax_j z_j  + epsilon ) |v_j|

Mean and covariance are the row's own, over its prompt and all that followed (`of=prompt`), or the model's, from
statistics (`of=calibration`). The softmax runs over the tokens that may go; sinks and window are not among them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvjax.errors import UserError, check_between, check_choice
from kvjax.rope import Rope
from kvjax.scoring import by_group, group_mean
from kvjax.selection import SELECTIONS, Scores, Selection, View
from kvjax.stages.facts import Arrays, LayerFacts


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Selection):
    """Keeps the tokens that expected queries attend to, weighted by their values' norms.

    Attributes:
      of: "prompt" or "calibration", whose queries are expected.
      future: positions to come over which rotations are averaged.
      covariance: 1 to use it, 0 for the mean alone.
      epsilon: added to the expected weight.
    """

    of: str = "prompt"
    future: int = 512
    covariance: int = 1
    epsilon: float = 0.0

    def __post_init__(self):
        check_choice("expected_attention(of)", self.of, ("prompt", "calibration"))
        check_between("expected_attention(future)", self.future, 1, 1 << 20)
        check_choice("expected_attention(covariance)", self.covariance, (0, 1))
        check_between("expected_attention(epsilon)", self.epsilon, 0.0, 1e6)

    @property
    def wants_moments(self) -> bool:
        """Where the row's own queries are expected."""
        return self.of == "prompt"

    def fit(self, facts: LayerFacts) -> tuple[Selection, Arrays]:
        """Takes the model's statistics where they are asked for."""
        fitted, arrays = super().fit(facts)
        if facts.shape.rope is None:
            raise UserError("expected_attention needs a model that rotates its queries and keys.")
        if self.of == "prompt":
            return fitted, arrays
        mean, second = facts.query_moments()
        return fitted, {"mean": np.asarray(mean, np.float32), "second": np.asarray(second, np.float32)}

    def score(self, view: View) -> Scores:
        """Expected weight times the value's norm."""
        if self.of == "prompt":
            mean, second = view.moments.mean, view.moments.second
        else:
            mean, second = view.arrays["mean"][None], view.arrays["second"][None]
        size = view.shape.head_size
        cos, sin = mean_turns(view.shape.rope, view.num_seen, self.future)
        turned = turn(mean, cos[:, None], sin[:, None])  # B N D
        keys = view.keys
        logits = jnp.einsum("BKGD,BKSD->BKGS", by_group(turned, view), keys) / jnp.sqrt(jnp.float32(size))
        if self.covariance:
            spread = second - mean[..., :, None] * mean[..., None, :]
            half = turn(jnp.swapaxes(spread, -1, -2), cos[:, None, None], sin[:, None, None])  # Sigma R^T, rows turned
            both = turn(jnp.swapaxes(half, -1, -2), cos[:, None, None], sin[:, None, None])
            met = jnp.einsum("BKGDR,BKSR->BKGSD", by_group(both, view), keys)
            logits += jnp.einsum("BKGSD,BKSD->BKGS", met, keys) / (2 * size)
        flat = logits.reshape(logits.shape[0], -1, logits.shape[3])
        held = jnp.repeat(view.scorable, view.group, axis=1)
        weights = jax.nn.softmax(jnp.where(held, flat, -1e30), axis=-1)
        return (group_mean(weights, view) + self.epsilon) * jnp.linalg.norm(view.values, axis=3)


def mean_turns(
    rope: Rope, num_seen: Int[Array, "B"], future: int
) -> tuple[Float[Array, "B half"], Float[Array, "B half"]]:
    """Mean cosine and sine of each band over the positions num_seen, ..., num_seen + future - 1.

    The mean of a geometric series: a turn by num_seen, times the mean turn of the first `future` positions, which is
    summed on the host in float64.
    """
    frequencies = rope.frequencies().astype(np.float64)
    mean = np.mean(np.exp(1j * np.arange(future)[:, None] * frequencies), axis=0) * rope.attention_factor()
    phases = num_seen.astype(jnp.float32)[:, None] * rope.frequencies()[None]
    real, imaginary = (jnp.asarray(part, jnp.float32)[None] for part in (mean.real, mean.imag))
    cos, sin = jnp.cos(phases), jnp.sin(phases)
    return cos * real - sin * imaginary, sin * real + cos * imaginary


def turn(vectors: Float[Array, "... D"], cos: Float[Array, "... half"], sin: Float[Array, "... half"]) -> jax.Array:
    """Vectors turned band by band, of any scale."""
    first, second = jnp.split(vectors, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


SELECTIONS.register("expected_attention", ExpectedAttention)
