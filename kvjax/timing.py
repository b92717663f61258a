"""Seconds of decode steps, without what Python adds to each."""

import functools
import time

import jax
import jax.numpy as jnp

from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, decode_step


@functools.partial(jax.jit, donate_argnames="cache")
def run_steps(model: LanguageModel, cache: KVCache, count: jax.Array) -> KVCache:
    """Decodes `count` tokens, all of id 0, in each row, without leaving the device; the cache is donated."""
    batch = cache.num_seen.shape[0]
    tokens, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)

    def step(_: jax.Array, cache: KVCache) -> KVCache:
        return decode_step(model, cache, tokens, lengths=lengths)[1]

    return jax.lax.fori_loop(0, count, step, cache)


def seconds_per_step(model: LanguageModel, cache: KVCache, *, count: int) -> tuple[float, KVCache]:
    """Mean seconds of a decode step, rounds included, over `count` of them; one more runs first, to compile.

    Args:
      model: the model.
      cache: with room for `count` + 1 tokens; donated.
      count: steps, at least 1.

    Returns:
      The seconds, and the cache after these steps.
    """
    cache = jax.block_until_ready(run_steps(model, cache, jnp.int32(1)))
    since = time.perf_counter()
    cache = jax.block_until_ready(run_steps(model, cache, jnp.int32(count)))
    return (time.perf_counter() - since) / count, cache
