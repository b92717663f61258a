"""The choice of an implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select import IMPLEMENTATIONS, chosen_implementation, select

SLOTS = {"protected": jnp.zeros((2, 5), bool), "recency": jnp.broadcast_to(jnp.arange(5), (2, 5))}
SCORES = jnp.asarray([[1.0, 5.0, 2.0, 4.0, 3.0]] * 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_named_implementation_equals_the_automatic_one(implementation):
    named = select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3]), implementation=implementation)
    np.testing.assert_array_equal(named, select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3])))
    np.testing.assert_array_equal(named, [[False, True, False, True, False], [False, True, False, True, True]])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of reference"):
        select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3]), implementation="cuda")
    assert chosen_implementation() in IMPLEMENTATIONS
