"""The choice of an implementation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import api, reference
from kernels_pallas.decode_attention.reference import MASSES
from tests.kernels_pallas.decode_attention.parts import made, of_bits, of_floats
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


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("implementation", ["reference", "mosaic_tpu"])
def test_masses_alone_are_those_beside_the_outputs(mass, implementation, monkeypatch):
    """Of two segments, with padding and a bias; what stands for a kernel takes two tokens at a time."""
    monkeypatch.setattr(api, "_ROWS_OF_TURN", 8)
    seen = []

    def walk(segment, *given, mesh):
        seen.append(segment.queries.shape[1])
        return reference.walk(segment, *given)

    stand_in = dataclasses.replace(
        api._KERNELS["mosaic_tpu"],
        unsupported=lambda *_: None,
        walk=walk,
        mass=lambda *given, mesh: reference.mass_of(*given),
    )
    monkeypatch.setitem(api._KERNELS, "mosaic_tpu", stand_in)
    first, positions = made(of_bits(4), of_floats("float32"), tokens=5, slots=128)
    other, _ = made(of_floats("float32"), of_floats("float32"), tokens=5, slots=64, seed=1)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=first.queries.shape[:3]), jnp.float32)
    segments, positions = (first, dataclasses.replace(other, bias=bias)), positions.at[:, 4].set(-1)
    given = {"query_positions": positions, "scale": 0.125, "mass": mass}
    wanted = [attended.mass for attended in api.decode_attention(segments, implementation="reference", **given)]
    assert seen == []
    ours = api.attention_mass(segments, implementation=implementation, **given)
    assert set(seen) == ({2} if implementation == "mosaic_tpu" else set())
    for found, one in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5, atol=1e-6)
