"""The compiled parts of a generation: prefill with a first token, and blocks of decode steps in one loop.

start          prompts -> cache, first token of each row
decode_block   a loop of decode steps: feed the newest token, draw the next, until a limit or all rows stopped
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax import axes
from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, decode_step, read
from kvjax.sampling import Sampling, sample

PADDING = -1
"""What a row yields after its stop token."""

_LEAST_BUCKET = 16


@functools.partial(jax.tree_util.register_dataclass, data_fields=("cache", "tokens", "stopped", "keys"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """What the token loop carries.

    Attributes:
      cache: everything seen so far, the newest token not among it.
      tokens: `B` int32, the newest token of each row, still to be fed.
      stopped: `B` bool, rows that take no more tokens.
      keys: `B` PRNG keys, one a row; a draw folds the position in.
    """

    cache: Any
    tokens: Any
    stopped: Any
    keys: Any


def padded_rows(rows: Sequence[Sequence[int]], *, batch: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens in one array, filled up to a bucket of lengths so that few shapes compile.

    Args:
      rows: token ids, at most `batch` rows.
      batch: B; rows that are left over are empty.
      most: tokens of a row at most.

    Returns:
      `B T` int32, T a power of two or `most`, and the rows' lengths, `B` int32.
    """
    lengths = np.zeros(batch, np.int32)
    lengths[: len(rows)] = [len(row) for row in rows]
    bucket = min(max(_LEAST_BUCKET, 1 << max(int(lengths.max()) - 1, 0).bit_length()), most)
    tokens = np.zeros((batch, bucket), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, lengths


@functools.partial(jax.jit, static_argnames=("sampling", "stop_tokens"), donate_argnames="cache")
def start(
    params: LanguageModel,
    cache: KVCache,
    tokens: axes.Tokens,
    *,
    lengths: axes.Lengths,
    then: tuple[axes.FurtherTokens, axes.Lengths] | None = None,
    keys: axes.RowKeys,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> DecodeState:
    """Reads prompts and draws the first token; rows of length 0 are idle and count as stopped.

    Args:
      params: the model.
      cache: empty; donated.
      tokens: prompts, as for `prefill`.
      lengths: of the prompts.
      then: tokens that come when the prompts have been compressed, and how many in each row; None for none.
      keys: PRNG keys of the rows.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a row.
    """
    logits, cache = read(params, cache, tokens, lengths=lengths, then=then)
    first = sample(logits, _draw_keys(keys, cache), sampling=sampling)
    stopped = _is_stop(first, stop_tokens) | (lengths == 0)
    return DecodeState(cache=cache, tokens=first, stopped=stopped, keys=keys)


@functools.partial(jax.jit, static_argnames=("num_steps", "sampling", "stop_tokens"), donate_argnames="state")
def decode_block(
    params: LanguageModel,
    state: DecodeState,
    limit: jax.Array,
    *,
    num_steps: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[DecodeState, jax.Array]:
    """Decodes up to min(limit, num_steps) tokens a row; returns them as `B num_steps`, padded with -1."""

    def step(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
        index, state, block = carry
        lengths = jnp.where(state.stopped, 0, 1).astype(jnp.int32)
        logits, cache = decode_step(params, state.cache, state.tokens[:, None], lengths=lengths)
        drawn = sample(logits[:, 0], _draw_keys(state.keys, cache), sampling=sampling)
        token = jnp.where(state.stopped, PADDING, drawn)
        stopped = state.stopped | _is_stop(drawn, stop_tokens)
        feed = jnp.where(state.stopped, state.tokens, drawn)
        block = jax.lax.dynamic_update_slice(block, token[:, None], (0, index))
        return index + 1, DecodeState(cache=cache, tokens=feed, stopped=stopped, keys=state.keys), block

    def goes_on(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
        index, state, _ = carry
        return (index < jnp.minimum(limit, num_steps)) & ~jnp.all(state.stopped)

    block = jnp.full((state.tokens.shape[0], num_steps), PADDING, jnp.int32)
    _, state, block = jax.lax.while_loop(goes_on, step, (jnp.int32(0), state, block))
    return state, block


def _draw_keys(keys: axes.RowKeys, cache: KVCache) -> axes.RowKeys:
    """A key for each row's next draw: it depends on the row's seed and position alone."""
    return jax.vmap(jax.random.fold_in)(keys, cache.num_seen)


def _is_stop(tokens: jax.Array, stop_tokens: tuple[int, ...]) -> jax.Array:
    """Whether each token is one to stop at."""
    if not stop_tokens:
        return jnp.zeros(tokens.shape, jnp.bool_)
    return jnp.any(tokens[:, None] == jnp.asarray(stop_tokens, jnp.int32)[None, :], axis=1)
