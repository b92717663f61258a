"""The compiled loop (whole generations: test_generation.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.sampling import Sampling
from kvjax.token_loop import PADDING, decode_block, padded_rows, start
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


def test_what_comes_then_is_read_behind_the_prompt_and_idle_rows_stay_idle():
    """The first token is that of both together, and of a stop token the row has stopped."""
    model = tiny_model()
    keys = jax.vmap(jax.random.key)(jnp.arange(3, dtype=jnp.uint32))

    def begin(tokens, lengths, then=None, rule=RULE):
        cache = kvjax.init_cache(model, batch=3, max_tokens=32)
        return start(model, cache, jnp.asarray(tokens), lengths=jnp.asarray(lengths), then=then, keys=keys, **rule)

    whole = begin([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0], [0] * 5], [5, 3, 0])
    then = jnp.asarray([[4, 5], [8, 9], [9, 9]]), jnp.asarray([2, 1, 0])
    parted = begin([[1, 2, 3], [6, 7, 0], [0, 0, 0]], [3, 2, 0], then)
    np.testing.assert_array_equal(parted.cache.num_seen, [5, 3, 0])
    np.testing.assert_array_equal(parted.tokens[:2], whole.tokens[:2])
    assert parted.stopped.tolist() == [False, False, True]
    rule = {**RULE, "stop_tokens": (int(whole.tokens[0]),)}
    assert begin([[1, 2, 3], [6, 7, 0], [0, 0, 0]], [3, 2, 0], then, rule).stopped.tolist()[0]


@pytest.mark.parametrize(
    ("longest", "most", "bucket"),
    [(1, 100, 16), (16, 100, 16), (17, 100, 32), (64, 100, 64), (65, 100, 100), (5, 8, 8), (100, 100, 100)],
)
def test_rows_fill_up_to_a_power_of_two_or_to_what_there_is_room_for(longest, most, bucket):
    rows = [[7] * longest, [8]]
    tokens, lengths = padded_rows(rows, batch=3, most=most)
    assert (tokens.shape, tokens.dtype, lengths.dtype) == ((3, bucket), np.int32, np.int32)
    np.testing.assert_array_equal(lengths, [longest, 1, 0])
    np.testing.assert_array_equal(tokens[0, :longest], 7)
    assert tokens[1, 0] == 8
    assert tokens.sum() == 7 * longest + 8
