"""The choice of an implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.encode import IMPLEMENTATIONS, Integers, chosen_implementation, encode, mosaic_tpu
from kernels_pallas.encode.api import choose

NUMBERS = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 8, 16)), jnp.float32)
INT8 = Integers(bits=8, symmetric=True)


def test_a_named_implementation_equals_the_automatic_one():
    named, automatic = encode(NUMBERS, INT8, implementation="reference"), encode(NUMBERS, INT8)
    np.testing.assert_array_equal(named.planes[0], automatic.planes[0])
    np.testing.assert_array_equal(named.scale, automatic.scale)
    np.testing.assert_allclose(named.read(), NUMBERS, atol=np.abs(NUMBERS).max() / 250)


def test_an_implementation_that_is_unknown_or_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of mosaic_tpu, triton_gpu, reference"):
        encode(NUMBERS, INT8, implementation="cuda")
    with pytest.raises(ValueError, match="encode: mosaic_tpu cannot serve this: it runs on TPUs, and this is cpu"):
        encode(NUMBERS, INT8, implementation="mosaic_tpu")
    choice = choose(NUMBERS, INT8)
    reasons = "mosaic_tpu: it runs on TPUs, and this is cpu", "triton_gpu: it runs on NVIDIA GPUs, and this is cpu"
    assert (choice.name, choice.reasons) == ("reference", reasons)
    assert chosen_implementation() == "reference"
    assert chosen_implementation() in IMPLEMENTATIONS


def test_with_several_devices_the_kernel_wants_the_mesh(monkeypatch):
    """Without it nobody could say how the arrays lie, and the compiler spreads only the reference."""
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda *facts, basis: None)
    choice = choose(NUMBERS, INT8)
    assert choice.name == "reference"
    assert choice.reasons[0] == "mosaic_tpu: the mesh over 8 devices is not given"
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert choose(NUMBERS, INT8, mesh=mesh).name == "mosaic_tpu"
    assert choose(NUMBERS, INT8, implementation="mosaic_tpu").name == "mosaic_tpu"
    assert choose(NUMBERS, INT8, mesh=mesh, implementation="reference").name == "reference"
    assert chosen_implementation() == "reference"
    assert chosen_implementation(mesh) == "mosaic_tpu"
