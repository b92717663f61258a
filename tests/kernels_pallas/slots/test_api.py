"""The choice of an implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.slots import IMPLEMENTATIONS, chosen_implementation, mosaic_tpu, put_slots, take_slots
from kernels_pallas.slots.api import choose_put

PARTS = (Coded(planes=(jnp.arange(24.0).reshape(1, 2, 6, 2),)),)
INDEX = jnp.asarray([[[4, 1], [0, 5]]])


def test_a_named_implementation_equals_the_automatic_one():
    (taken,) = take_slots(PARTS, INDEX, implementation="reference")
    np.testing.assert_array_equal(taken.planes[0], take_slots(PARTS, INDEX)[0].planes[0])
    np.testing.assert_array_equal(taken.planes[0][0, :, :, 0], [[8, 2], [12, 22]])
    (done,) = put_slots(PARTS, (Coded(planes=(-taken.planes[0],)),), INDEX, implementation="reference")
    np.testing.assert_array_equal(done.planes[0][0, :, :, 0], [[0, -2, 4, 6, -8, 10], [-12, 14, 16, 18, 20, -22]])


def test_an_implementation_that_is_unknown_or_cannot_serve_is_refused():
    for function, arguments in ((take_slots, (PARTS, INDEX)), (put_slots, (PARTS, PARTS, INDEX))):
        with pytest.raises(ValueError, match="no implementation 'cuda': give one of mosaic_tpu, triton_gpu, reference"):
            function(*arguments, implementation="cuda")
        with pytest.raises(
            ValueError, match="slots: mosaic_tpu cannot serve this: it (puts, and does not|runs on TPUs)"
        ):
            function(*arguments, implementation="mosaic_tpu")
    choice = choose_put(PARTS, 2)
    reasons = "mosaic_tpu: it runs on TPUs, and this is cpu", "triton_gpu: it runs on NVIDIA GPUs, and this is cpu"
    assert (choice.name, choice.reasons) == ("reference", reasons)
    assert chosen_implementation() == "reference"
    assert chosen_implementation() in IMPLEMENTATIONS


def test_with_several_devices_the_kernel_wants_the_mesh(monkeypatch):
    """Without it nobody could say how the arrays lie, and the compiler spreads only the reference."""
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda *facts: None)
    choice = choose_put(PARTS, 2)
    assert choice.name == "reference"
    assert choice.reasons[0] == "mosaic_tpu: the mesh over 8 devices is not given"
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert choose_put(PARTS, 2, mesh=mesh).name == "mosaic_tpu"
    assert choose_put(PARTS, 2, implementation="mosaic_tpu").name == "mosaic_tpu"
    assert choose_put(PARTS, 2, mesh=mesh, implementation="reference").name == "reference"
    assert chosen_implementation() == "reference"
    assert chosen_implementation(mesh) == "mosaic_tpu"
