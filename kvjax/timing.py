"""Seconds of decode steps, without what Python adds to each."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, decode_step
from kvjax.walk import STEPS, Walk, stop_mask, walk


@functools.partial(jax.jit, donate_argnames="cache")
def run_steps(model: LanguageModel, cache: KVCache, count: jax.Array) -> KVCache:
    """Decodes `count` tokens, all of id 0, in each row, without leaving the device; the cache is donated."""
    batch = cache.num_seen.shape[0]
    tokens, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)

    def step(_: jax.Array, cache: KVCache) -> KVCache:
        return decode_step(model, cache, tokens, lengths=lengths)[1]

    return jax.lax.fori_loop(0, count, step, cache)


def seconds_per_step(model: LanguageModel, cache: KVCache, *, count: int) -> float:
    """Mean seconds of a decode step, rounds included, over `count` of them; one more runs first, to compile.

    The compiled steps are those that generate and follow answers, `kvjax/walk.py`.

    Args:
      model: the model.
      cache: with room for `count` + 1 tokens; donated.
      count: steps, at least 1.
    """
    batch = cache.num_seen.shape[0]
    given, stops = np.zeros((batch, STEPS), np.int32), stop_mask(model)
    state = Walk.of(cache, tokens=np.zeros(batch), left=np.full(batch, count + 1))
    state, *_ = jax.block_until_ready(walk(model, state, given, stops, np.int32(1)))
    since = time.perf_counter()
    for start in range(0, count, STEPS):
        state, *_ = walk(model, state, given, stops, np.int32(min(STEPS, count - start)))
    jax.block_until_ready(state)
    return (time.perf_counter() - since) / count
