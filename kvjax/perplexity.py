"""How far a compressed cache moves a model's next-token distributions, on text.

    row of text:   [ prefix: prefilled, uncompressed attention | scored: every token sees the cache as decoding would ]

For each scored token the model's log-probability of it (perplexity), and the divergence of the whole distribution from
the one with the uncompressed cache, KL(full || policy), which notices what perplexity averages away.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, compressed_decode, init_cache, prefill
from kvjax.policy import Policy
from kvjax.statistics import Statistics

_CHUNK = 125  # scored tokens a call at most


@dataclasses.dataclass(frozen=True)
class Scores:
    """One policy's distributions on rows of text.

    Attributes:
      log_probabilities: `rows scored V` float32.
      targets: `rows scored` int32, the tokens that came.
      cache: as the last rows left it.
    """

    log_probabilities: np.ndarray
    targets: np.ndarray
    cache: KVCache

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-probability of the tokens that came."""
        taken = np.take_along_axis(self.log_probabilities, self.targets[..., None], axis=-1)
        return float(np.exp(-np.mean(taken, dtype=np.float64)))


def score(
    model: LanguageModel,
    policy: Policy,
    rows: np.ndarray,
    *,
    prefix: int,
    statistics: Statistics | None = None,
) -> Scores:
    """Runs rows of text through a cache.

    Args:
      model: the model.
      policy: what the cache keeps.
      rows: `rows prefix+scored` int32.
      prefix: tokens that are prefilled, at least 1.
      statistics: of the model, for policies that need them.
    """
    tokens = jnp.asarray(rows, jnp.int32)
    cache = init_cache(model, policy, batch=rows.shape[0], max_tokens=rows.shape[1], statistics=statistics)
    logits, cache = prefill(model, cache, tokens[:, :prefix])
    found = [np.asarray(jax.nn.log_softmax(logits))[:, None]]
    # Fixed chunks, the last one filled up with tokens that do not count, so that one shape compiles.
    chunk = min(_CHUNK, rows.shape[1])
    for start in range(prefix, rows.shape[1] - 1, chunk):
        count = min(chunk, rows.shape[1] - 1 - start)
        piece = jnp.zeros((rows.shape[0], chunk), jnp.int32).at[:, :count].set(tokens[:, start : start + count])
        lengths = jnp.full((rows.shape[0],), count, jnp.int32)
        logits, cache = compressed_decode(model, cache, piece, lengths=lengths)
        found.append(np.asarray(jax.nn.log_softmax(logits))[:, :count])
    return Scores(np.concatenate(found, axis=1), rows[:, prefix:].astype(np.int32), cache)


@functools.partial(jax.jit)
def _divergence(base: jax.Array, other: jax.Array) -> jax.Array:
    """KL(base || other) in nats over the last axis, from log-probabilities."""
    return jnp.sum(jnp.exp(base) * (base - other), axis=-1)


def compare(base: Scores, other: Scores) -> dict[str, float]:
    """How one policy's distributions differ from another's, usually `full`.

    Returns:
      `perplexity`, `perplexity_change` (a share), `kl_mean` and `kl_p999` in nats, `top1_agreement` (a share).
    """
    divergence = np.asarray(_divergence(base.log_probabilities, other.log_probabilities), np.float64)
    agree = np.argmax(base.log_probabilities, axis=-1) == np.argmax(other.log_probabilities, axis=-1)
    return {
        "perplexity": other.perplexity,
        "perplexity_change": other.perplexity / base.perplexity - 1,
        "kl_mean": float(np.mean(divergence)),
        "kl_p999": float(np.quantile(divergence, 0.999)),
        "top1_agreement": float(np.mean(agree)),
    }
