"""TriAttention (arXiv 2604.04921): the weight that a key expects from queries to come, by trigonometry alone.

A query head's queries before RoPE gather around a centre. With q~_f the complex mean of band f, m_f the mean of |q_f|,
omega_f the band's frequency, s RoPE's factor, and kappa_f the cached (rotated) key, the score of a key for a query that
is delta tokens ahead of the next position t, averaged over a set of distances D:

    S(k) = mean_D sum_f Re( s q~_f e^{i omega_f (t + delta)} conj(kappa_f) )  +  sum_f s (m_f - |q~_f|) |kappa_f|

The mean over D touches one factor of each band only, so all distances collapse into one product with the cached key:

    mu_f = mean_D e^{i omega_f delta}        (a constant, float64 on the host)
    S(k) = sum_f Re( w_f conj(kappa_f) ) + c_f |kappa_f|,    w_f = s q~_f mu_f e^{i omega_f t},   c_f = s (m_f - |q~_f|)

No key is turned back, and positions of keys do not enter. Scores are standardised for each query head over the tokens
that may go, and the largest of a group counts. Statistics come from `python -m kvjax.calibrate` or the authors' files.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from kvjax._kernels import score
from kvjax.errors import UserError, check_between, check_choice
from kvjax.rope import Rope
from kvjax.scoring import group_max
from kvjax.selection import SELECTIONS, Scores, Selection, View
from kvjax.stages.facts import Arrays, LayerFacts

MODES = ("layer", "head", "union")
"""What agrees on one set of tokens: nothing, each head of each layer for itself; the same head of all layers, on the
mean (the authors' `per_head`); all heads of all layers, on the largest (`union`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TriAttention(Selection):
    """Keeps the keys that expect most attention.

    Attributes:
      mode: one of `MODES`.
      offsets: largest distance; D is 1, 2, 4, ... up to it.
      trig: 0 leaves the first term out.
      norm: 0 leaves the second term out.
    """

    mode: str = "layer"
    offsets: int = 65536
    trig: int = 1
    norm: int = 1

    def __post_init__(self):
        check_choice("triattention(mode)", self.mode, MODES)
        check_between("triattention(offsets)", self.offsets, 1, 1 << 24)
        check_choice("triattention(trig)", self.trig, (0, 1))
        check_choice("triattention(norm)", self.norm, (0, 1))

    @property
    def shares(self) -> str:
        """By mode."""
        return {"layer": "none", "head": "layers", "union": "all"}[self.mode]

    def fit(self, facts: LayerFacts) -> tuple[Selection, Arrays]:
        """Each query head's centre and the weights of its bands."""
        rope = facts.shape.rope
        if rope is None:
            raise UserError("triattention needs a model that rotates its queries and keys.")
        centre, norm = facts.query_centre()
        half = centre.shape[1] // 2
        bands = centre[:, :half] + 1j * centre[:, half:]  # N D/2
        factor = rope.attention_factor()
        weighted = factor * bands * mean_phase(rope, self.offsets)
        arrays = {
            "real": weighted.real.astype(np.float32),
            "imaginary": weighted.imag.astype(np.float32),
            "spread": (factor * (norm - np.abs(bands))).astype(np.float32),
        }
        return super().fit(facts)[0], arrays

    def score(self, view: View) -> Scores:
        """Standardised, the largest of each group."""
        heard = standardised(self.query_scores(view), jnp.repeat(view.scorable, view.group, axis=1))
        return group_max(heard, view)

    def query_scores(self, view: View) -> Float[Array, "B N S"]:
        """S(k) for every query head."""
        arrays = view.arrays
        phases = view.num_seen.astype(jnp.float32)[:, None, None] * view.shape.rope.frequencies()[None, None]
        cos, sin = jnp.cos(phases), jnp.sin(phases)  # B 1 D/2
        real, imaginary = arrays["real"][None], arrays["imaginary"][None]
        ahead = jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)  # B N D
        if not (self.trig or self.norm):
            return jnp.zeros((*ahead.shape[:2], view.positions.shape[2]), jnp.float32)
        terms = {"rows": ahead if self.trig else None, "weights": arrays["spread"][None] if self.norm else None}
        return jnp.concatenate([score(keys, **terms, mesh=view.placement.mesh) for keys in view.pieces], axis=2)


def mean_phase(rope: Rope, offsets: int) -> np.ndarray:
    """mu_f, complex128 [D/2]: the mean of e^{i omega_f delta} over delta = 1, 2, 4, ... up to `offsets`."""
    distances = 2.0 ** np.arange(int(np.log2(offsets)) + 1)
    return np.mean(np.exp(1j * distances[:, None] * rope.frequencies().astype(np.float64)), axis=0)


def standardised(scores: Float[Array, "B N S"], counted: Bool[Array, "B N S"]) -> Float[Array, "B N S"]:
    """(score - mean) / standard deviation over the tokens that count, the deviation at least 1e-6."""
    count = jnp.maximum(jnp.sum(counted, axis=2, keepdims=True), 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(counted, scores, 0.0), axis=2, keepdims=True) / count
    centred = scores - mean
    variance = jnp.sum(jnp.where(counted, centred**2, 0.0), axis=2, keepdims=True) / count
    return centred / jnp.maximum(jnp.sqrt(variance), 1e-6)


SELECTIONS.register("triattention", TriAttention)
