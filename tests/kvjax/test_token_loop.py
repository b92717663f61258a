"""The compiled loop (whole generations: test_generation.py)."""

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.sampling import Sampling
from kvjax.token_loop import PADDING, decode_block, start
from tests.tiny import tiny_model

RULE = {"sampling": Sampling(), "stop_tokens": ()}


def test_a_block_stops_at_its_limit_and_leaves_idle_rows_alone():
    model = tiny_model()
    cache = kvjax.init_cache(model, batch=2, max_tokens=32)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    tokens = jnp.asarray([[1, 2, 3], [0, 0, 0]])
    state = start(model, cache, tokens, lengths=jnp.asarray([3, 0]), keys=keys, **RULE)
    assert state.stopped.tolist() == [False, True]
    state, block = decode_block(model, state, jnp.int32(3), num_steps=8, **RULE)
    block = np.asarray(block)
    assert (block[0, :3] != PADDING).all()
    assert (block[0, 3:] == PADDING).all()
    assert (block[1] == PADDING).all()
    np.testing.assert_array_equal(state.cache.num_seen, [6, 0])
    assert (np.asarray(state.cache.layers[0].exact.positions)[1] == -1).all()
