"""The choice of an implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.slots import IMPLEMENTATIONS, chosen_implementation, put_slots, take_slots

PARTS = (Coded(planes=(jnp.arange(24.0).reshape(1, 2, 6, 2),)),)
INDEX = jnp.asarray([[[4, 1], [0, 5]]])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_named_implementation_equals_the_automatic_one(implementation):
    (taken,) = take_slots(PARTS, INDEX, implementation=implementation)
    np.testing.assert_array_equal(taken.planes[0], take_slots(PARTS, INDEX)[0].planes[0])
    np.testing.assert_array_equal(taken.planes[0][0, :, :, 0], [[8, 2], [12, 22]])
    (done,) = put_slots(PARTS, (Coded(planes=(-taken.planes[0],)),), INDEX, implementation=implementation)
    np.testing.assert_array_equal(done.planes[0][0, :, :, 0], [[0, -2, 4, 6, -8, 10], [-12, 14, 16, 18, 20, -22]])


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of reference"):
        take_slots(PARTS, INDEX, implementation="cuda")
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of reference"):
        put_slots(PARTS, PARTS, INDEX, implementation="cuda")
    assert chosen_implementation() in IMPLEMENTATIONS
