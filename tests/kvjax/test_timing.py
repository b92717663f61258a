"""Steps that run without Python between them."""

import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.timing import run_steps, seconds_per_step
from tests.contract.codecs import model, random_tokens


def filled():
    cache = kvjax.init_cache(model(), "full", batch=2, max_tokens=40)
    return kvjax.prefill(model(), cache, jnp.asarray(random_tokens(2, 8)))[1]


def test_steps_are_those_of_decoding():
    ours = run_steps(model(), filled(), jnp.int32(5))
    _, theirs = kvjax.compressed_decode(model(), filled(), jnp.zeros((2, 5), jnp.int32))
    np.testing.assert_array_equal(ours.num_seen, [13, 13])
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        np.testing.assert_array_equal(one.exact.positions, other.exact.positions)
        np.testing.assert_allclose(one.exact.keys[:, :, :13], other.exact.keys[:, :, :13], rtol=0, atol=1e-5)


def test_the_seconds_of_a_step_are_positive():
    assert seconds_per_step(model(), filled(), count=3) > 0
