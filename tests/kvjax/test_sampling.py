"""Sampling rules against their definitions in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.sampling import Sampling, _cut, check_sampling, sample

LOGITS = np.log(np.asarray([[0.4, 0.05, 0.3, 0.15, 0.1], [0.1, 0.6, 0.1, 0.1, 0.1]], np.float32))


def kept(sampling):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in np.asarray(_cut(jnp.asarray(LOGITS), sampling))]


def test_cuts_keep_what_they_say():
    assert kept(Sampling(top_k=2))[0] == [0, 2]
    assert kept(Sampling(top_k=9))[0] == [0, 1, 2, 3, 4]
    assert kept(Sampling(top_p=0.65))[0] == [0, 2]
    assert kept(Sampling(top_p=0.75))[0] == [0, 2, 3]
    assert kept(Sampling(top_p=1e-6)) == [[0], [1]]  # never nothing
    assert kept(Sampling(min_p=0.3))[0] == [0, 2, 3]
    assert kept(Sampling(top_k=3, min_p=0.5))[0] == [0, 2]
    assert kept(Sampling(top_k=2))[1] == [0, 1, 2, 3, 4]  # ties with the last kept token stay


def test_greedy_ignores_cuts_and_keys():
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(jnp.asarray(LOGITS), keys, sampling=Sampling(top_k=1)).tolist() == [0, 1]


def test_draws_follow_the_distribution():
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    logits = jnp.tile(jnp.asarray(LOGITS[:1]), (count, 1))
    drawn = np.asarray(sample(logits, keys, sampling=Sampling(temperature=2.0, top_k=4)))
    weights = np.sqrt([0.4, 0.0, 0.3, 0.15, 0.1])
    shares = np.bincount(drawn, minlength=5) / count
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)
    assert shares[1] == 0


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .* it must be"):
        check_sampling(Sampling(**wrong))


def test_a_tiny_temperature_is_greedy():
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(jnp.asarray(LOGITS), keys, sampling=Sampling(temperature=1e-40)).tolist() == [0, 1]
