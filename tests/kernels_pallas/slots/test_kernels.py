"""What every kernel of the operation does in interpret mode: it writes what the reference writes, byte for byte."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, Rotated
from kernels_pallas.slots import mosaic_tpu, put_slots, triton_gpu
from kernels_pallas.slots.api import choose_put_for
from tests.kernels_pallas.slots.drawn import assert_same, by_reference, coded, drawn

CHIPS = {mosaic_tpu: "TPU v6 lite", triton_gpu: "NVIDIA H200"}
MOST_NEW = {mosaic_tpu: 1024, triton_gpu: 4096}


def name_of(kernel):
    return kernel.__name__.rpartition(".")[2]


@pytest.fixture(params=CHIPS, ids=name_of)
def kernel(request):
    return request.param


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_equals_the_reference(kernel, bits):
    """Each width, 3 in two planes."""
    parts, new = (coded(bits, 64),), (coded(bits, 24, seed=2),)
    assert kernel.unsupported(parts, 24, 1, CHIPS[kernel]) is None
    assert_same(kernel, parts, new, drawn(64, 24))


@pytest.mark.parametrize("order", [[4, 5, 6, 7], [7, 5, 6, 4]])
def test_all_tokens_of_a_byte_are_replaced_and_all_others_stay(kernel, order):
    parts, new = (coded(2, 128),), (coded(2, 8, seed=2),)
    slots = jnp.broadcast_to(jnp.asarray([*order, 127, 0, -1, 64], jnp.int32), (2, 2, 8))
    (pair, *_) = assert_same(kernel, parts, new, slots)
    changed = (np.asarray(pair[0]) != np.asarray(parts[0].planes[0])).any(axis=(0, 1, 3))
    assert set(np.flatnonzero(changed)) == {0, 1, 16, 31}


def test_none_come(kernel):
    (pair, *_) = assert_same(kernel, (coded(4, 64),), (coded(4, 8, seed=2),), jnp.full((2, 2, 8), -1, jnp.int32))
    np.testing.assert_array_equal(pair[0], coded(4, 64).planes[0])


def test_parts_that_hold_floats_beside_codes_and_heads_that_share_stored_numbers(kernel):
    old, new = coded(4, 64, heads=1), coded(4, 8, heads=1, seed=2)
    floats = [
        Coded(planes=(jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, n, 4)), jnp.float32),)) for n in (64, 8)
    ]
    turn = {"basis": jnp.ones((2, 16, 8)), "mean": None, "frequencies": (1.0,) * 4}
    slots = jnp.repeat(drawn(64, 8, heads=1), 2, axis=1)
    assert_same(kernel, (Rotated(parts=(old,), **turn), floats[0]), (Rotated(parts=(new,), **turn), floats[1]), slots)


@pytest.mark.parametrize("heads", [2, 3])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(kernel, heads, monkeypatch):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(kernel, "unsupported", lambda *facts: None)
    monkeypatch.setattr(kernel, "put_fields", functools.partial(kernel.put_fields, interpret=True))
    parts, new, slots = (coded(2, 128, heads=heads),), (coded(2, 8, heads=heads, seed=2),), drawn(128, 8, heads=heads)
    ours = jax.jit(functools.partial(put_slots, mesh=mesh))(parts, new, slots)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(by_reference(parts, new, slots)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu"}, "and this is cpu"),
        ({"unit": 32}, "units of 32 slots move together"),
        ({"parts": (Coded(planes=(jnp.zeros((1, 1, 32, 8)),)),)}, "there are no packed codes"),
        ({"num_new": 8192}, "8192 tokens come at once, more than {most_new}"),
        ({"parts": (coded(4, 8, size=2048),)}, "tokens have 2048 numbers, more than 1024"),
    ],
)
def test_what_is_not_served_says_why(kernel, changes, reason):
    given = {"parts": (coded(4, 64),), "num_new": 8, "unit": 1, "device": CHIPS[kernel]} | changes
    said = kernel.unsupported(**given)
    assert said.endswith(reason.format(most_new=MOST_NEW[kernel]))
    assert f"{name_of(kernel)}: {said}" in choose_put_for(**given).reasons


def test_the_choice_on_a_chip(kernel):
    assert choose_put_for((coded(4, 64),), 8, CHIPS[kernel]).name == name_of(kernel)
