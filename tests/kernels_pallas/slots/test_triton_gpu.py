"""The GPU kernel in interpret mode writes what the reference writes, byte for byte, says what it does not serve, and
what the compiler for an H200 that is not there makes of it.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, Rotated
from kernels_pallas.slots import put_slots, reference, triton_gpu
from kernels_pallas.slots.api import choose_put_for
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.slots.test_mosaic_tpu import coded, drawn

CHIP = "NVIDIA H200"


@functools.partial(jax.jit, static_argnames="interpret")
def by_kernel(parts, new, slots, interpret=True):
    put_fields = functools.partial(triton_gpu.put_fields, interpret=interpret)
    return reference.put_slots(parts, new, slots, unit=1, put_fields=put_fields)


by_reference = jax.jit(functools.partial(reference.put_slots, unit=1))


def assert_same(parts, new, slots, **how):
    ours, theirs = by_kernel(parts, new, slots, **how), by_reference(parts, new, slots)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    return pairs


@pytest.mark.parametrize(("bits", "slots", "size"), [(1, 64, 16), (2, 96, 24), (3, 128, 16), (4, 64, 16), (8, 70, 32)])
def test_equals_the_reference(bits, slots, size):
    """Each width, 3 in two planes; numbers of tokens and of channels that are no powers of two."""
    parts, new = (coded(bits, slots, size=size),), (coded(bits, 24, size=size, seed=2),)
    assert triton_gpu.unsupported(parts, 24, 1, CHIP) is None
    assert_same(parts, new, drawn(slots, 24))


def test_all_tokens_of_a_byte_are_replaced_and_all_others_stay():
    parts, new = (coded(2, 128),), (coded(2, 8, seed=2),)
    slots = jnp.broadcast_to(jnp.asarray([7, 5, 6, 4, 127, 0, -1, 64], jnp.int32), (2, 2, 8))
    (pair, *_) = assert_same(parts, new, slots)
    changed = (np.asarray(pair[0]) != np.asarray(parts[0].planes[0])).any(axis=(0, 1, 3))
    assert set(np.flatnonzero(changed)) == {0, 1, 16, 31}


def test_none_come():
    (pair, *_) = assert_same((coded(4, 64),), (coded(4, 8, seed=2),), jnp.full((2, 2, 8), -1, jnp.int32))
    np.testing.assert_array_equal(pair[0], coded(4, 64).planes[0])


def test_parts_that_hold_floats_beside_codes_and_heads_that_share_stored_numbers():
    old, new = coded(4, 64, heads=1), coded(4, 8, heads=1, seed=2)
    floats = [
        Coded(planes=(jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, n, 4)), jnp.float32),)) for n in (64, 8)
    ]
    turn = {"basis": jnp.ones((2, 16, 8)), "mean": None, "frequencies": (1.0,) * 4}
    slots = jnp.repeat(drawn(64, 8, heads=1), 2, axis=1)
    assert_same((Rotated(parts=(old,), **turn), floats[0]), (Rotated(parts=(new,), **turn), floats[1]), slots)


@pytest.mark.parametrize("heads", [2, 3])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(heads, monkeypatch):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(triton_gpu, "unsupported", lambda *facts: None)
    monkeypatch.setattr(triton_gpu, "put_fields", functools.partial(triton_gpu.put_fields, interpret=True))
    parts, new, slots = (coded(2, 128, heads=heads),), (coded(2, 8, heads=heads, seed=2),), drawn(128, 8, heads=heads)
    ours = jax.jit(functools.partial(put_slots, mesh=mesh))(parts, new, slots)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(by_reference(parts, new, slots)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "TPU v6 lite"}, "it runs on NVIDIA GPUs, and this is TPU v6 lite"),
        ({"unit": 32}, "units of 32 slots move together"),
        ({"parts": (Coded(planes=(jnp.zeros((1, 1, 32, 8)),)),)}, "there are no packed codes"),
        ({"num_new": 8192}, "8192 tokens come at once, more than 4096"),
        ({"parts": (coded(4, 8, size=2048),)}, "tokens have 2048 numbers, more than 1024"),
        (
            {"parts": (Coded(planes=(jax.ShapeDtypeStruct((32, 8, 1 << 16, 128), jnp.int8),), bits=8),)},
            "a plane takes 2 GiB or more",
        ),
    ],
)
def test_what_is_not_served_says_why(changes, reason):
    given = {"parts": (coded(4, 64),), "num_new": 8, "unit": 1, "device": CHIP} | changes
    assert triton_gpu.unsupported(**given) == reason
    if "device" not in changes:
        assert f"triton_gpu: {reason}" in choose_put_for(**given).reasons


def test_the_choice_on_a_gpu():
    assert choose_put_for((coded(4, 64),), 8, CHIP).name == "triton_gpu"


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_gpu_writes_what_the_reference_writes(bits):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    parts, new = (coded(bits, 2048, size=128),), (coded(bits, 256, size=128, seed=2),)
    assert_same(parts, new, drawn(2048, 256), interpret=False)


@needs_cuda
@pytest.mark.parametrize("name", ["1", "4", "8"])
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources([__file__, name], tmp_path, record_property)
    assert registers <= 128
    assert spilled == 0


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    function = functools.partial(triton_gpu.put_fields, width=int(name))
    sizes = ((8, 8, 16_384 * int(name) // 8, 128), jnp.int8), ((8, 8, 128, 128), jnp.uint8), ((8, 8, 128), jnp.int32)
    compile_kernel(function, [jax.ShapeDtypeStruct(*size) for size in sizes], name="slots", folder=folder)
