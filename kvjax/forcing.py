"""What a model makes of a given continuation with a compressed cache, token by token: teacher forcing.

    [ prompt: prefilled | then: finds the prompt compressed | answer: every token sees the cache as decoding would ]

For each token of the answer there is the model's whole distribution: its log-probability of the token that comes
(perplexity), and its divergence from what it is with the uncompressed cache, KL(full || policy), which notices what
perplexity averages away.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import axes
from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, compressed_decode, init_cache, read
from kvjax.errors import UserError
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
      cache: as the last tokens left it; None where it has been let go.
    """

    log_probabilities: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    cache: KVCache | None

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

    Raises:
      UserError: a prompt is longer than what the policy can pin.
    """
    empty = init_cache(model, policy, batch=len(prompts), max_tokens=max_tokens, statistics=statistics)
    empty = empty if prepare is None else prepare(empty)
    targets, counted = _targets(answers)
    found, last = [], empty
    for logs, count, cache in _along(model, empty, prompts, then=then, targets=targets, counted=counted):
        found.append(np.asarray(logs)[:, :count])
        last = cache
    return Followed(np.concatenate(found, axis=1), targets, counted, last)


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
    targets, counted = _targets(answers)
    chunk = min(_CHUNK, max(most_tokens - 1, 1))
    both = []
    for policy in policies:
        cache = init_cache(model, policy, batch=len(prompts), max_tokens=max_tokens, statistics=statistics)
        both.append(_along(model, cache, prompts, then=(), targets=targets, counted=counted, chunk=chunk))
    nats, agree = [], []
    for (base, count, _), (other, _, _) in zip(*both, strict=True):
        nats.append(np.asarray(_divergence(base, other), np.float64)[:, :count])
        agree.append(np.asarray(_same_top(base, other))[:, :count])
    return np.where(counted, np.concatenate(nats, axis=1), 0.0), counted & np.concatenate(agree, axis=1)


def _targets(answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Answers as one array, `B T` int32, and where they are, `B T` bool."""
    counts = np.asarray([len(answer) for answer in answers])
    targets = np.zeros((len(answers), counts.max()), np.int32)
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = answer
    return targets, np.arange(targets.shape[1])[None] < counts[:, None]


def _along(
    model: LanguageModel,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    *,
    then: Sequence[Sequence[int]],
    targets: np.ndarray,
    counted: np.ndarray,
    chunk: int | None = None,
) -> Iterator[tuple[jax.Array, int, KVCache]]:
    """Reads prompts and then answers; yields log-probabilities `B t V`, how many of the t count, and the cache."""
    _check_pins(cache, max(map(len, prompts)))
    tokens, lengths = _place(model, prompts, cache.max_tokens)
    asked = _place(model, then, cache.max_tokens) if len(then) else None
    logits, cache = _read(model, cache, tokens, lengths=lengths, then=asked)
    yield jax.nn.log_softmax(logits)[:, None], 1, cache
    # Fixed chunks, the last one filled up with tokens that do not count, so that one shape compiles. An answer's last
    # token is never fed.
    counts, longest = counted.sum(axis=1), targets.shape[1]
    chunk = chunk or min(_CHUNK, max(longest - 1, 1))
    for start in range(0, longest - 1, chunk):
        count = min(chunk, longest - 1 - start)
        piece = np.zeros((len(targets), chunk), np.int32)
        piece[:, :count] = targets[:, start : start + count]
        fed = jnp.asarray(np.clip(counts - 1 - start, 0, count), jnp.int32)
        logits, cache = compressed_decode(model, cache, jnp.asarray(piece), lengths=fed)
        yield jax.nn.log_softmax(logits), count, cache


def _check_pins(cache: KVCache, longest: int) -> None:
    """Raises `UserError` for prompts that are longer than what the policy can pin; they would give NaN."""
    most = cache.policy.most_pinned(shape=cache.shape, max_tokens=cache.max_tokens)
    if most is not None and longest > most:
        raise UserError(f"A prompt of {longest} tokens is longer than what '{cache.policy}' can pin: {most}.")


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
