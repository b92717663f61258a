"""Answers token by token through a compressed cache: its own, or given ones. One compiled loop serves both.

    [ prompt: prefilled | then: finds the prompt compressed | answer: every token sees the cache as decoding would ]

    answer   the likeliest token comes next, until a stop token
    follow   the token that is given comes next, whatever the model says: teacher forcing

For each token there is the model's whole distribution: its log-probability of the token that comes (perplexity), and
its divergence from what it is with the uncompressed cache (`kvjax/forcing.py`). Functions are compiled once for each
policy and size, so that generating, following and timing (`kvjax/timing.py`) share them.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kvjax import axes
from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, decode_step, init_cache, read
from kvjax.errors import UserError
from kvjax.policy import Policy
from kvjax.statistics import Statistics
from kvjax.token_loop import PADDING, padded_rows

STEPS = 16
"""Tokens of a compiled call at most."""

OWN = PADDING
"""Stands for a token that is not given: the likeliest is taken."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("cache", "tokens", "left"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Where the rows are.

    Attributes:
      cache: everything seen so far, the newest token not among it.
      tokens: `B` int32, the newest token of each row, still to be fed.
      left: `B` int32, how many tokens each row still feeds.
    """

    cache: Any
    tokens: Any
    left: Any

    @classmethod
    def of(cls, cache: KVCache, *, tokens: np.ndarray | jax.Array, left: np.ndarray) -> "Walk":
        """Rows at their start, each where the cache has it."""
        put = cache.placement.put
        return cls(
            cache=cache, tokens=put(np.asarray(tokens, np.int32), "B"), left=put(np.asarray(left, np.int32), "B")
        )


@dataclasses.dataclass(frozen=True)
class Followed:
    """One policy's distributions along answers.

    Attributes:
      log_probabilities: `B T V` float32; `B 0 V` where they were not wanted.
      targets: `B T` int32, the tokens that came.
      counted: `B T` bool, False behind a row's end.
      cache: as the last tokens left it; None where it has been let go.
    """

    log_probabilities: np.ndarray
    targets: np.ndarray
    counted: np.ndarray
    cache: KVCache | None

    @property
    def answers(self) -> list[list[int]]:
        """The tokens of each row."""
        return [row[there].tolist() for row, there in zip(self.targets, self.counted, strict=True)]

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
    cache = _empty(model, policy, len(prompts), max_tokens, statistics, prepare)
    _, logs, cache = begin(model, cache, prompts, then=then)
    targets, counted = as_targets(answers)
    stops = stop_mask(model)
    state = Walk.of(cache, tokens=targets[:, 0], left=counted.sum(axis=1) - 1)
    found = [np.asarray(logs)[:, None]]
    for start in range(1, targets.shape[1], STEPS):
        count = min(STEPS, targets.shape[1] - start)
        given = np.zeros((len(targets), STEPS), np.int32)
        given[:, :count] = targets[:, start : start + count]
        state, _, logs = walk(model, state, given, stops, np.int32(count))
        found.append(np.asarray(logs)[:, :count])
    return Followed(np.concatenate(found, axis=1), targets, counted, state.cache)


def answer(
    model: LanguageModel,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop_tokens: Collection[int] = (),
    then: Sequence[Sequence[int]] = (),
    max_tokens: int,
    statistics: Statistics | None = None,
    prepare: Callable[[KVCache], KVCache] | None = None,
    distributions: bool = True,
) -> Followed:
    """Lets a model answer greedily; most arguments are those of `follow`.

    Args:
      new_tokens: most tokens of an answer, at least 1.
      stop_tokens: ids that end an answer, as its last token.
      distributions: whether log-probabilities are wanted; large vocabularies make them large.
    """
    cache = _empty(model, policy, len(prompts), max_tokens, statistics, prepare)
    first, logs, cache = begin(model, cache, prompts, then=then)
    stops = stop_mask(model, stop_tokens)
    left = np.where(stops[np.asarray(first)], 0, new_tokens - 1)
    state = Walk.of(cache, tokens=first, left=left)
    tokens, found = [np.asarray(first)[:, None]], [np.asarray(logs)[:, None]]
    given = np.full((len(prompts), STEPS), OWN, np.int32)
    while np.any(state.left):
        state, block, logs = walk(model, state, given, stops, np.int32(STEPS))
        tokens.append(np.asarray(block))
        if distributions:
            found.append(np.asarray(logs))
    targets = np.concatenate(tokens, axis=1)
    targets = targets[:, : (targets != PADDING).sum(axis=1).max()]
    logs = np.concatenate(found, axis=1)[:, : targets.shape[1] if distributions else 0]
    return Followed(logs, np.maximum(targets, 0), targets != PADDING, state.cache)


@functools.partial(jax.jit, donate_argnames="state")
def walk(
    params: LanguageModel, state: Walk, given: axes.Tokens, stops: Bool[Array, "V"], limit: Int[Array, ""]
) -> tuple[Walk, axes.Tokens, axes.Logits]:
    """Feeds up to `limit` tokens a row, fewer where no row has any left.

    Args:
      params: the model.
      state: where the rows are; donated.
      given: `B n`, the token that comes after each step, `OWN` for the likeliest.
      stops: tokens behind which a row feeds no more, if it took them of its own.
      limit: at most n.

    Returns:
      Where the rows are then; the tokens that came, `B n`, -1 where a row took none; and log-probabilities of what
      comes after each step, `B n V` float32, without meaning where a row took none.
    """
    batch, steps = given.shape

    def step(carry: tuple[jax.Array, Walk, jax.Array, jax.Array]) -> tuple[jax.Array, Walk, jax.Array, jax.Array]:
        index, state, block, logs = carry
        goes = state.left > 0
        logits, cache = decode_step(params, state.cache, state.tokens[:, None], lengths=goes.astype(jnp.int32))
        led = jax.lax.dynamic_slice_in_dim(given, index, 1, axis=1)[:, 0]
        likeliest = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        coming = jnp.where(led == OWN, likeliest, led)
        left = jnp.where((led == OWN) & stops[coming], 0, jnp.maximum(state.left - 1, 0))
        block = jax.lax.dynamic_update_slice(block, jnp.where(goes, coming, PADDING)[:, None], (0, index))
        logs = jax.lax.dynamic_update_slice(logs, jax.nn.log_softmax(logits), (0, index, 0))
        coming, left = cache.placement.constrain(coming, "B"), cache.placement.constrain(left, "B")
        return index + 1, Walk(cache=cache, tokens=coming, left=left), block, logs

    def goes_on(carry: tuple[jax.Array, Walk, jax.Array, jax.Array]) -> jax.Array:
        index, state, *_ = carry
        return (index < jnp.minimum(limit, steps)) & jnp.any(state.left > 0)

    block = jnp.full((batch, steps), PADDING, jnp.int32)
    logs = jnp.zeros((batch, steps, params.cache_shape.vocab_size), jnp.float32)
    _, state, block, logs = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, block, logs))
    return state, block, logs


def begin(
    model: LanguageModel, cache: KVCache, prompts: Sequence[Sequence[int]], *, then: Sequence[Sequence[int]]
) -> tuple[Int[Array, "B"], axes.LastLogits, KVCache]:
    """Reads prompts, and what comes then, into an empty cache, which is donated.

    Returns:
      Each row's likeliest next token, `B` int32; log-probabilities of all, `B V` float32; the cache.

    Raises:
      UserError: a prompt is longer than what the policy can pin; it would give NaN.
    """
    most = cache.policy.most_pinned(shape=cache.shape, max_tokens=cache.max_tokens)
    longest = max(map(len, prompts))
    if most is not None and longest > most:
        raise UserError(f"A prompt of {longest} tokens is longer than what '{cache.policy}' can pin: {most}.")
    tokens, lengths = _place(model, prompts, cache.max_tokens)
    asked = _place(model, then, cache.max_tokens) if len(then) else None
    return _read(model, cache, tokens, lengths=lengths, then=asked)


@functools.partial(jax.jit, donate_argnames="cache")
def _read(
    params: LanguageModel,
    cache: KVCache,
    tokens: axes.Tokens,
    *,
    lengths: axes.Lengths,
    then: tuple[axes.FurtherTokens, axes.Lengths] | None,
) -> tuple[Int[Array, "B"], axes.LastLogits, KVCache]:
    logits, cache = read(params, cache, tokens, lengths=lengths, then=then)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jax.nn.log_softmax(logits), cache


def as_targets(answers: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Answers as one array, `B T` int32, and where they are, `B T` bool."""
    counts = np.asarray([len(one) for one in answers])
    targets = np.zeros((len(answers), counts.max()), np.int32)
    for row, tokens in enumerate(answers):
        targets[row, : len(tokens)] = tokens
    return targets, np.arange(targets.shape[1])[None] < counts[:, None]


def stop_mask(model: LanguageModel, tokens: Collection[int] = ()) -> np.ndarray:
    """Which tokens end a row, `V` bool; a tokenizer may name some that the model never gives."""
    return np.isin(np.arange(model.cache_shape.vocab_size), list(tokens))


def _empty(
    model: LanguageModel,
    policy: Policy,
    batch: int,
    max_tokens: int,
    statistics: Statistics | None,
    prepare: Callable[[KVCache], KVCache] | None,
) -> KVCache:
    empty = init_cache(model, policy, batch=batch, max_tokens=max_tokens, statistics=statistics)
    return empty if prepare is None else prepare(empty)


def _place(model: LanguageModel, rows: Sequence[Sequence[int]], most: int) -> tuple[jax.Array, jax.Array]:
    tokens, lengths = padded_rows(rows, batch=len(rows), most=most)
    return model.placement.put(tokens, "B T"), model.placement.put(lengths, "B")
