"""The choice of an implementation."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels_pallas.decode_attention.test_reference import attend, inputs


def test_the_reference_equals_the_automatic_choice():
    queries, keys, values = inputs()
    where = {
        "query_positions": jnp.full((2, 1), 299),
        "key_positions": jnp.broadcast_to(jnp.arange(300), (2, 300)),
    }
    named = attend(queries, keys, values=values, implementation="reference", **where)
    np.testing.assert_array_equal(named, attend(queries, keys, values=values, **where))


def test_an_unknown_implementation_is_refused():
    queries, keys, values = inputs()
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of mosaic_tpu, triton_gpu, reference"):
        attend(
            queries,
            keys,
            values=values,
            query_positions=jnp.zeros((2, 1), jnp.int32),
            key_positions=jnp.zeros((2, 300), jnp.int32),
            implementation="cuda",
        )


def test_an_unknown_mass_is_refused():
    queries, keys, values = inputs()
    where = {"query_positions": jnp.zeros((2, 1), jnp.int32), "key_positions": jnp.zeros((2, 300), jnp.int32)}
    with pytest.raises(ValueError, match="gives no mass 'mean': ask for one of sum, peak, low"):
        attend(queries, keys, values=values, mass="mean", **where)
