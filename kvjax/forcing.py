"""How a compressed cache moves a model's distributions along answers: KL(full || policy), token by token.

It notices what perplexity averages away. `compare` takes what `kvjax/walk.py` found; `divergence_along` leads two
caches side by side along long answers, many tokens a call, and keeps no distribution.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, compressed_decode, init_cache
from kvjax.policy import Policy
from kvjax.statistics import Statistics
from kvjax.walk import Followed, as_targets, begin

_CHUNK = 125  # tokens a call at most


def divergence_along(
    model: LanguageModel,
    policies: tuple[Policy, Policy],
    prompts: Sequence[Sequence[int]],
    *,
    answers: Sequence[Sequence[int]],
    max_tokens: int,
    statistics: Statistics | None = None,
    most_tokens: int = _CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """How the distributions of two policies differ along given answers.

    Both caches are led side by side and no distribution is kept, so answers may be long and vocabularies large.

    Args:
      model: the model.
      policies: the one to compare with, usually `full`, and the other.
      prompts: token ids, at least one a row; prefilled.
      answers: token ids, at least one a row.
      max_tokens: room of the caches.
      statistics: of the model, for policies that need them.
      most_tokens: of an answer as far as is known before, so that all calls compile once.

    Returns:
      KL(first || second) of each token, nats, `B T` float64, 0 behind a row's end; and whether both find the same
      token the likeliest, `B T` bool, False behind a row's end.
    """
    targets, counted = as_targets(answers)
    chunk = min(_CHUNK, max(most_tokens - 1, 1))
    both = []
    for policy in policies:
        cache = init_cache(model, policy, batch=len(prompts), max_tokens=max_tokens, statistics=statistics)
        both.append(_along(model, cache, prompts, targets=targets, counted=counted, chunk=chunk))
    nats, agree = [], []
    for (base, count), (other, _) in zip(*both, strict=True):
        nats.append(np.asarray(_divergence(base, other), np.float64)[:, :count])
        agree.append(np.asarray(_same_top(base, other))[:, :count])
    return np.where(counted, np.concatenate(nats, axis=1), 0.0), counted & np.concatenate(agree, axis=1)


def _along(
    model: LanguageModel,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    *,
    targets: np.ndarray,
    counted: np.ndarray,
    chunk: int,
) -> Iterator[tuple[jax.Array, int]]:
    """Reads prompts and answers; yields log-probabilities `B t V`, and how many of the t count."""
    _, logs, cache = begin(model, cache, prompts, then=())
    yield logs[:, None], 1
    # Fixed chunks, the last one filled up with tokens that do not count, so that one shape compiles. An answer's last
    # token is never fed.
    counts, longest = counted.sum(axis=1), targets.shape[1]
    for start in range(0, longest - 1, chunk):
        count = min(chunk, longest - 1 - start)
        piece = np.zeros((len(targets), chunk), np.int32)
        piece[:, :count] = targets[:, start : start + count]
        fed = jnp.asarray(np.clip(counts - 1 - start, 0, count), jnp.int32)
        logits, cache = compressed_decode(model, cache, jnp.asarray(piece), lengths=fed)
        yield jax.nn.log_softmax(logits), count


@jax.jit
def _divergence(base: jax.Array, other: jax.Array) -> jax.Array:
    """KL(base || other) in nats over the last axis, from log-probabilities."""
    return jnp.sum(jnp.exp(base) * (base - other), axis=-1)


@jax.jit
def _same_top(base: jax.Array, other: jax.Array) -> jax.Array:
    """Whether the largest entries over the last axis have the same place."""
    return jnp.argmax(base, axis=-1) == jnp.argmax(other, axis=-1)


def num_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def divergence(base: Followed, other: Followed) -> np.ndarray:
    """KL(base || other), nats, of each token of each answer, `B T` float64; 0 behind a row's end."""
    found = np.asarray(_divergence(base.log_probabilities, other.log_probabilities), np.float64)
    return np.where(base.counted, found, 0.0)


def compare(base: Followed, other: Followed) -> dict[str, float]:
    """How one policy's distributions differ from another's, usually `full`.

    Returns:
      `perplexity`, `perplexity_change` (a share), `kl_mean` and `kl_p999` in nats, `top1_agreement` (a share).
    """
    nats = divergence(base, other)[base.counted]
    agree = np.argmax(base.log_probabilities, axis=-1) == np.argmax(other.log_probabilities, axis=-1)
    return {
        "perplexity": other.perplexity,
        "perplexity_change": other.perplexity / base.perplexity - 1,
        "kl_mean": float(np.mean(nats)),
        "kl_p999": float(np.quantile(nats, 0.999)),
        "top1_agreement": float(np.mean(agree[base.counted])),
    }
