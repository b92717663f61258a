"""How the next token is drawn: greedy, or by temperature with top-k, top-p and min-p cuts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """A sampling rule; cuts apply in the order temperature, top-k, top-p, min-p, as in transformers.

    Attributes:
      temperature: divisor of the logits, at least 0; 0 is greedy, whatever the cuts say.
      top_k: keep this many of the likeliest tokens; 0 keeps all.
      top_p: keep the fewest likeliest tokens whose probabilities sum to at least this, in (0, 1] (arXiv 1904.09751).
      min_p: keep tokens at least this share as likely as the likeliest, in [0, 1) (arXiv 2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def check_sampling(sampling: Sampling) -> None:
    """Raises `UserError` for a value out of range."""
    ranges = {
        "temperature": (sampling.temperature >= 0, "at least 0; 0 is greedy"),
        "top_k": (sampling.top_k >= 0, "a whole number, at least 0; 0 keeps all tokens"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= sampling.min_p < 1, "at least 0 and below 1"),
    }
    for name, (holds, expected) in ranges.items():
        if not holds:
            raise UserError(f"{name} is {getattr(sampling, name)}; it must be {expected}.")


def sample(logits: axes.LastLogits, keys: axes.RowKeys, *, sampling: Sampling) -> Int[Array, "B"]:
    """Draws a token for each row.

    Args:
      logits: `B V` float32.
      keys: `B` PRNG keys, one a row, so that no row's draw depends on its neighbours.
      sampling: the rule (static).

    Returns:
      Token ids, `B` int32.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The likeliest token at 0, so that a tiny temperature overflows to -inf and never to +inf.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    kept = _cut(shifted / sampling.temperature, sampling)
    draw = jax.vmap(functools.partial(jax.random.categorical, axis=-1))
    return draw(keys, kept).astype(jnp.int32)


def _cut(logits: axes.LastLogits, sampling: Sampling) -> axes.LastLogits:
    """Sets the logits of all but the kept tokens to -inf; ties with the last kept token stay."""
    if sampling.top_k == 0 and sampling.top_p == 1 and sampling.min_p == 0:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)
    if 0 < sampling.top_k < logits.shape[-1]:
        ranks = jnp.arange(logits.shape[-1])[None, :]
        ordered = jnp.where(ranks < sampling.top_k, ordered, -jnp.inf)
    kept = ordered > -jnp.inf
    probabilities = jax.nn.softmax(ordered, axis=-1)
    if sampling.top_p < 1:
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept &= before < sampling.top_p
    if sampling.min_p > 0:
        kept &= probabilities >= sampling.min_p * probabilities[:, :1]
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)
