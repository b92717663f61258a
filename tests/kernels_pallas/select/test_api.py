"""The choice of an implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select import IMPLEMENTATIONS, chosen_implementation, mosaic_tpu, select
from kernels_pallas.select.api import choose

SLOTS = {"protected": jnp.zeros((2, 5), bool), "recency": jnp.broadcast_to(jnp.arange(5), (2, 5))}
SCORES = jnp.asarray([[1.0, 5.0, 2.0, 4.0, 3.0]] * 2)


def test_a_named_implementation_equals_the_automatic_one():
    named = select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3]), implementation="reference")
    np.testing.assert_array_equal(named, select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3])))
    np.testing.assert_array_equal(named, [[False, True, False, True, False], [False, True, False, True, True]])


def test_an_implementation_that_is_unknown_or_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of mosaic_tpu, triton_gpu, reference"):
        select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3]), implementation="cuda")
    with pytest.raises(ValueError, match="select: mosaic_tpu cannot serve this: it runs on TPUs, and this is cpu"):
        select(SCORES, **SLOTS, budgets=jnp.asarray([2, 3]), implementation="mosaic_tpu")
    choice = choose((2, 5))
    reasons = "mosaic_tpu: it runs on TPUs, and this is cpu", "triton_gpu: it runs on NVIDIA GPUs, and this is cpu"
    assert (choice.name, choice.reasons) == ("reference", reasons)
    assert chosen_implementation() == "reference"
    assert chosen_implementation() in IMPLEMENTATIONS


def test_with_several_devices_the_kernel_wants_the_mesh(monkeypatch):
    """Without it nobody could say how the arrays lie, and the compiler spreads only the reference."""
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda shape, device: None)
    assert len(jax.devices()) > 1
    choice = choose((2, 5))
    assert choice.name == "reference"
    assert choice.reasons[0] == "mosaic_tpu: the mesh over 8 devices is not given"
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    assert choose((2, 5), mesh=mesh).name == "mosaic_tpu"
    assert choose((2, 5), implementation="mosaic_tpu").name == "mosaic_tpu"
    assert choose((2, 5), mesh=mesh, implementation="reference").name == "reference"
    assert chosen_implementation() == "reference"
    assert chosen_implementation(mesh) == "mosaic_tpu"
