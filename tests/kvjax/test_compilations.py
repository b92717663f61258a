"""Counts of compilations: by name, of what is compiled while one counts, and of nothing else."""

import jax
import jax.numpy as jnp
import pytest

from kvjax.compilations import compilations


def test_each_new_shape_of_a_function_counts_once():
    @jax.jit
    def doubled(numbers):
        return numbers * 2

    @jax.jit
    def halved(numbers):
        return numbers / 2

    one, two = jnp.ones(3), jnp.ones(4)
    doubled(one)
    with compilations() as counts:
        doubled(one)
        assert counts["doubled"] == 0
        doubled(two)
        doubled(two)
        halved(one)
        with compilations() as inner:
            halved(two)
    doubled(jnp.ones(5))
    assert (counts["doubled"], counts["halved"], inner["doubled"], inner["halved"]) == (1, 2, 0, 1)


def test_counting_ends_where_an_error_comes():
    @jax.jit
    def tripled(numbers):
        return numbers * 3

    ones = jnp.ones(3)
    with pytest.raises(RuntimeError, match="stop"), compilations() as counts:
        raise RuntimeError("stop")
    tripled(ones)
    assert counts["tripled"] == 0
