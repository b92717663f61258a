"""What a model makes of a given continuation with a compressed cache, token by token: teacher forcing.

    [ prompt: prefilled | then: finds the prompt compressed | answer: every token sees the cache as decoding would ]

For each token of the answer there is the model's whole distribution: its log-probability of the token that comes
(perplexity), and its divergence from what it is with the uncompressed cache, KL(full || policy), which notices what
perplexity averages away.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import axes
from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, compressed_decode, init_cache, read
from kvjax.policy import Policy
from kvjax.statistics import Statistics
from kvjax.token_loop import padded_rows

_CHUNK = 125  # tokens a call at most


@dataclasses.dataclass(frozen=True)
class Followed:
    """One policy's distributions along answers.

    Attributes:
      log_probabilities: `B T V` float32.
      targets: `B T` int32, the tokens that came.
      counted: `B T` bool, False behind a row's end.
      cache: as the last tokens left it.
    """

    log_probabilities: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    cache: KVCache

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-probability of the tokens that came."""
        taken = np.take_along_axis(self.log_probabilities, self.targets[..., None], axis=-1)[..., 0]
        return float(np.exp(-np.mean(taken[self.counted], dtype=np.float64)))


def follow(
    model: LanguageModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    answers: Sequence[Sequence[int]],
    then: Sequence[Sequence[int]] = (),
    max_tokens: int,
    statistics: Statistics | None = None,
    prepare: Callable[[KVCache], KVCache] | None = None,
) -> Followed:
    """Runs prompts and given answers through a cache.

    Args:
      model: the model.
      policy: what the cache keeps.
      prompts: token ids, at least one a row; prefilled.
      answers: token ids, at least one a row.
      then: tokens between the two that come when the prompts have been compressed, at least one a row, or nothing.
      max_tokens: room of the cache.
      statistics: of the model, for policies that need them.
      prepare: is given the empty cache, and gives the one to use.
    """
    batch = len(prompts)
    cache = init_cache(model, policy, batch=batch, max_tokens=max_tokens, statistics=statistics)
    cache = cache if prepare is None else prepare(cache)
    tokens, lengths = _place(model, prompts, max_tokens)
    logits, cache = _read(
        model, cache, tokens, lengths=lengths, then=_place(model, then, max_tokens) if len(then) else None
    )
    longest = max(map(len, answers))
    counts = np.asarray([len(answer) for answer in answers])
    targets = np.zeros((batch, longest), np.int32)
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = answer
    found = [np.asarray(jax.nn.log_softmax(logits))[:, None]]
    # Fixed chunks, the last one filled up with tokens that do not count, so that one shape compiles. An answer's last
    # token is never fed.
    chunk = min(_CHUNK, longest)
    for start in range(0, longest - 1, chunk):
        count = min(chunk, longest - 1 - start)
        piece = np.zeros((batch, chunk), np.int32)
        piece[:, :count] = targets[:, start : start + count]
        fed = jnp.asarray(np.clip(counts - 1 - start, 0, count), jnp.int32)
        logits, cache = compressed_decode(model, cache, jnp.asarray(piece), lengths=fed)
        found.append(np.asarray(jax.nn.log_softmax(logits))[:, :count])
    counted = np.arange(longest)[None] < counts[:, None]
    return Followed(np.concatenate(found, axis=1), targets, counted, cache)


@functools.partial(jax.jit, donate_argnames="cache")
def _read(
    params: LanguageModel,
    cache: KVCache,
    tokens: axes.Tokens,
    *,
    lengths: axes.Lengths,
    then: tuple[axes.Tokens, axes.Lengths] | None,
) -> tuple[axes.LastLogits, KVCache]:
    return read(params, cache, tokens, lengths=lengths, then=then)


def _place(model: LanguageModel, rows: Sequence[Sequence[int]], most: int) -> tuple[jax.Array, jax.Array]:
    tokens, lengths = padded_rows(rows, batch=len(rows), most=most)
    return model.placement.put(tokens, "B T"), model.placement.put(lengths, "B")


@jax.jit
def _divergence(base: jax.Array, other: jax.Array) -> jax.Array:
    """KL(base || other) in nats over the last axis, from log-probabilities."""
    return jnp.sum(jnp.exp(base) * (base - other), axis=-1)


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
