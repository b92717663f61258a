"""The three functions that a JAX program calls: make a cache, fill it with prompts, decode with it.

    model = models.load_model("Qwen3-8B")
    cache = kvjax.init_cache(model, "full", batch=2, max_tokens=4096)
    logits, cache = kvjax.prefill(model, cache, prompts, lengths=lengths)     # logits of each row's last token
    logits, cache = kvjax.compressed_decode(model, cache, tokens)             # T >= 1 tokens a row

`params` is the Flax model itself, a pytree; any model that fits `LanguageModel` will do. Both functions are compiled
and donate the cache: the one that went in must not be used again.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from kvjax import axes
from kvjax.cache import KVCache, LayerCache
from kvjax.empty import empty_cache
from kvjax.errors import UserError
from kvjax.filling import settle
from kvjax.grammar import parse_policy
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.rounds import make_room, new_positions, room
from kvjax.sharding import Placement
from kvjax.statistics import Statistics


@runtime_checkable
class LanguageModel(Protocol):
    """What decoding needs of a model: a pytree with these members."""

    cache_shape: ModelShape
    placement: Placement

    def __call__(
        self,
        tokens: axes.Tokens,
        *,
        positions: axes.Positions,
        layers: tuple[LayerCache, ...] | None,
        phase: str,
    ) -> tuple[axes.Activations, tuple[LayerCache, ...] | None]:
        """Runs new tokens through the layers, phase "prefill" or "decode"; returns activations and caches."""

    def logits(self, hidden: axes.Activations) -> axes.Logits:
        """Scores of the next token."""


def init_cache(
    model: LanguageModel,
    policy: str | Policy = "full",
    *,
    batch: int,
    max_tokens: int,
    statistics: Statistics | None = None,
) -> KVCache:
    """Makes an empty cache for a model, on the model's device(s).

    Args:
      model: the model, concrete or abstract.
      policy: what the cache keeps, e.g. "full" or "turboquant(bits=4)"; see `kvjax/policy.py`.
      batch: B, sequences decoded together, at least 1.
      max_tokens: tokens that a sequence may see in all, prompt and new ones, at least 1.
      statistics: of this model (`kvjax.load_statistics`), for policies that need them.

    Returns:
      An empty `KVCache`.

    Raises:
      UserError: the policy is unknown or does not suit the model, it needs statistics and there are none or another
        model's, a number is below 1, or the model's sliding window is shorter than `max_tokens`.
    """
    policy = parse_policy(policy)
    for name, value in (("batch", batch), ("max_tokens", max_tokens)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    window = model.cache_shape.sliding_window
    if window is not None and max_tokens > window:
        raise UserError(
            f"The model attends within a sliding window of {window} tokens, which is not supported beyond the window: "
            f"max_tokens must be at most {window}, not {max_tokens}."
        )
    if statistics is not None:
        statistics.check(model.cache_shape)
    return empty_cache(
        model.cache_shape,
        policy=policy,
        batch=batch,
        max_tokens=max_tokens,
        placement=model.placement,
        statistics=statistics,
    )


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    params: LanguageModel, cache: KVCache, tokens: axes.Tokens, *, lengths: axes.Lengths | None = None
) -> tuple[axes.LastLogits, KVCache]:
    """Runs whole prompts and fills an empty cache with them.

    Args:
      params: the model.
      cache: an empty cache; donated.
      tokens: `B T` int32, prompts from the left, any token of the vocabulary as padding on the right.
      lengths: `B` int32, each row's tokens, 1 to T; None if all are T.

    Returns:
      The logits after each row's last token, `B V` float32, and the cache. A row that had seen tokens before gets
      NaN: go on with `compressed_decode`, which takes any number of tokens. So does a row whose prompt is longer than
      what the policy has room to pin (`Policy.most_pinned`).

    Raises:
      UserError: T exceeds the cache's `max_tokens`, or B is not its batch.
    """
    _check_tokens(cache, tokens)
    lengths = _full_lengths(tokens) if lengths is None else lengths.astype(jnp.int32)
    was_empty = (cache.num_seen == 0)[:, None]
    hidden, cache = _forward(params, cache, tokens, lengths=lengths, phase="prefill")
    pinned = jnp.zeros_like(lengths) if cache.policy.prompt is None else lengths
    cache = dataclasses.replace(cache, num_pinned=cache.placement.constrain(pinned, "B"))
    cache = settle(_replay(params, cache, tokens, lengths))
    last = jnp.maximum(lengths - 1, 0)[:, None, None]  # B 1 1
    last_hidden = jnp.take_along_axis(hidden, last, axis=1)  # B 1 M
    right = was_empty & ~_exceeds_pins(cache)[:, None]
    return jnp.where(right, params.logits(last_hidden)[:, 0], jnp.nan), cache


def pin_prompt(cache: KVCache, lengths: axes.Lengths) -> KVCache:
    """Keeps the first tokens of each row for ever, for prompts that come in chunks; `prefill` does it by itself.

    Args:
      cache: whose policy pins prompts (`prompt(...)`), before the tokens come.
      lengths: `B` int32, tokens of each row's prompt.

    Raises:
      UserError: the policy pins no prompts, or a row's prompt is longer than what it can pin.
    """
    most = cache.policy.most_pinned(shape=cache.shape, max_tokens=cache.max_tokens)
    if most is None:
        raise UserError(f"The policy '{cache.policy}' pins no prompts: add prompt(N), N the longest of them.")
    longest = int(jnp.max(lengths))
    if longest > most:
        raise UserError(f"A prompt of {longest} tokens is longer than what '{cache.policy}' can pin: {most}.")
    return dataclasses.replace(cache, num_pinned=cache.placement.constrain(lengths.astype(jnp.int32), "B"))


@functools.partial(jax.jit, donate_argnames="cache")
def compressed_decode(
    params: LanguageModel, cache: KVCache, tokens: axes.Tokens, *, lengths: axes.Lengths | None = None
) -> tuple[axes.Logits, KVCache]:
    """Decodes T new tokens a row with the cache, and adds them to it.

    Args:
      params: the model.
      cache: the cache so far; donated.
      tokens: `B T` int32, T at least 1: the next tokens of each row.
      lengths: `B` int32, how many of the T count in each row, 0 to T, from the left; None if all do. A row of length
        0 stays as it is.

    Returns:
      Logits after each token, `B T V` float32 (without meaning past a row's length), and the cache. A row that would
      see more than `max_tokens` tokens gets NaN: there is no room, and nothing wrong is returned in silence.

    Raises:
      UserError: T exceeds the cache's `max_tokens`, or B is not its batch.
    """
    _check_tokens(cache, tokens)
    return decode_step(params, cache, tokens, lengths=_full_lengths(tokens) if lengths is None else lengths)


def read(
    params: LanguageModel,
    cache: KVCache,
    tokens: axes.Tokens,
    *,
    lengths: axes.Lengths,
    then: tuple[axes.Tokens, axes.Lengths] | None = None,
) -> tuple[axes.LastLogits, KVCache]:
    """`prefill`, and behind it tokens that find the prompt compressed; to be called inside compiled code.

    Args:
      params: the model.
      cache: empty.
      tokens: `B T`, prompts, as for `prefill`.
      lengths: `B`, of the prompts.
      then: `B Q` tokens from the left and how many count in each row, at least 1 in rows with a prompt; None for none.

    Returns:
      The logits after each row's last token, `B V`, and the cache.
    """
    logits, cache = prefill(params, cache, tokens, lengths=lengths)
    if then is None:
        return logits, cache
    after, cache = decode_step(params, cache, then[0], lengths=then[1])
    last = jnp.maximum(then[1] - 1, 0)[:, None, None]
    return jnp.take_along_axis(after, last, axis=1)[:, 0], cache


def decode_step(
    params: LanguageModel, cache: KVCache, tokens: axes.Tokens, *, lengths: axes.Lengths
) -> tuple[axes.Logits, KVCache]:
    """`compressed_decode` without the compilation of its own, to be called inside a compiled loop."""
    lengths = lengths.astype(jnp.int32)
    if tokens.shape[1] == 1:
        hidden, cache = _forward(params, make_room(cache, lengths > 0), tokens, lengths=lengths, phase="decode")
        logits = params.logits(hidden)
    else:
        logits, cache = _in_passes(params, cache, tokens, lengths)
    overflows = (cache.num_seen > cache.max_tokens)[:, None, None]
    return jnp.where(overflows, jnp.nan, logits), cache


def _in_passes(
    params: LanguageModel, cache: KVCache, tokens: axes.Tokens, lengths: axes.Lengths
) -> tuple[axes.Logits, KVCache]:
    """Decodes a chunk; each pass takes as many tokens of each row as it has room for before its next round.

    A token therefore sees the same tokens exact and the same ones coded as if it had come alone.
    """
    batch, num_tokens = tokens.shape
    layer = cache.layers[0].exact
    width = min(num_tokens, layer.round_tokens if cache.layers[0].body is not None else layer.num_slots)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    steps = jnp.arange(width, dtype=jnp.int32)[None]

    def one_pass(carry: tuple[KVCache, jax.Array, jax.Array]) -> tuple[KVCache, jax.Array, jax.Array]:
        cache, done, logits = carry
        cache = make_room(cache, done < lengths)
        taken = jnp.minimum(jnp.minimum(lengths - done, room(cache)), width)
        places = done[:, None] + steps  # B width, columns of `tokens`
        piece = jnp.take_along_axis(tokens, jnp.minimum(places, num_tokens - 1), axis=1)
        hidden, cache = _forward(params, cache, piece, lengths=taken, phase="decode")
        places = jnp.where(steps < taken[:, None], places, num_tokens)  # outside: dropped
        return cache, done + taken, logits.at[rows, places].set(params.logits(hidden), mode="drop")

    logits = jnp.zeros((*tokens.shape, cache.shape.vocab_size), jnp.float32)
    carry = (cache, jnp.zeros_like(lengths), logits)
    cache, _, logits = jax.lax.while_loop(lambda carry: jnp.any(carry[1] < lengths), one_pass, carry)
    return logits, cache


def _forward(
    params: LanguageModel, cache: KVCache, tokens: axes.Tokens, *, lengths: axes.Lengths, phase: str
) -> tuple[axes.Activations, KVCache]:
    """Runs the model over new tokens; returns activations and the cache that has seen them."""
    positions = new_positions(cache, lengths, tokens.shape[1])
    hidden, layers = params(tokens, positions=positions, layers=cache.layers, phase=phase)
    num_seen = cache.placement.constrain(cache.num_seen + lengths, "B")
    return hidden, dataclasses.replace(cache, layers=layers, num_seen=num_seen)


def _replay(params: LanguageModel, cache: KVCache, tokens: axes.Tokens, lengths: axes.Lengths) -> KVCache:
    """Reads a prompt again, chunk by chunk, where the selection wants it; nothing is stored of the second reading."""
    selection = cache.policy.selection
    if selection is None or not selection.replay or any(layer.prompt is None for layer in cache.layers):
        return cache
    chunk = min(selection.replay, tokens.shape[1])
    count = -(-tokens.shape[1] // chunk)
    padded = jnp.pad(tokens, ((0, 0), (0, count * chunk - tokens.shape[1])))
    offsets = jnp.arange(chunk, dtype=jnp.int32)[None]

    def step(index: jax.Array, layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
        start = index * chunk
        piece = jax.lax.dynamic_slice_in_dim(padded, start, chunk, axis=1)
        positions = jnp.where(start + offsets < lengths[:, None], lengths[:, None] + offsets, axes.EMPTY)
        marked = tuple(
            dataclasses.replace(layer, prompt=dataclasses.replace(layer.prompt, replayed=start)) for layer in layers
        )
        return params(piece, positions=positions, layers=marked, phase="replay")[1]

    return dataclasses.replace(cache, layers=jax.lax.fori_loop(0, count, step, cache.layers))


def _exceeds_pins(cache: KVCache) -> Bool[Array, "B"]:
    """Rows whose prompt is longer than what the cache can pin."""
    most = cache.policy.most_pinned(shape=cache.shape, max_tokens=cache.max_tokens)
    return jnp.zeros(cache.num_pinned.shape, jnp.bool_) if most is None else cache.num_pinned > most


def _full_lengths(tokens: axes.Tokens) -> axes.Lengths:
    return jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)


def _check_tokens(cache: KVCache, tokens: axes.Tokens) -> None:
    """Refuses tokens that cannot fit; shapes only, so it costs nothing in compiled code."""
    batch = cache.num_seen.shape[0]
    if tokens.ndim != 2 or tokens.shape[0] != batch or tokens.shape[1] < 1:
        raise UserError(f"tokens have shape {tokens.shape}; the cache expects ({batch}, T) with T at least 1.")
    if tokens.shape[1] > cache.max_tokens:
        raise UserError(
            f"{tokens.shape[1]} tokens do not fit in a cache of max_tokens={cache.max_tokens}: "
            "make the cache with more, or shorten the prompt."
        )
