"""The kernel in interpret mode writes what the reference writes, byte for byte, and says what it does not serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.coded import Coded, Rotated, pack
from kernels_pallas.slots import mosaic_tpu, put_slots, reference
from kernels_pallas.slots.cases import CASES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"


def coded(bits, slots, *, heads=2, size=16, seed=0):
    generator, half = np.random.default_rng(seed), 1 << (bits - 1)
    codes = jnp.asarray(generator.integers(-half, half, (2, heads, slots, size)))
    scale = jnp.asarray(generator.normal(size=(2, heads, slots)), jnp.float16)
    return Coded(planes=pack(codes, bits), bits=bits, scale=scale)


def drawn(slots, count, *, heads=2, seed=1):
    """Distinct slots for each head, of which one goes nowhere."""
    generator = np.random.default_rng(seed)
    found = np.stack([generator.permutation(slots)[:count] for _ in range(2 * heads)]).reshape(2, heads, count)
    found[0, 0, count // 2] = -1
    return jnp.asarray(found, jnp.int32)


@functools.partial(jax.jit, static_argnames="interpret")
def by_kernel(parts, new, slots, interpret=True):
    put_fields = functools.partial(mosaic_tpu.put_fields, interpret=interpret)
    return reference.put_slots(parts, new, slots, unit=1, put_fields=put_fields)


by_reference = jax.jit(functools.partial(reference.put_slots, unit=1))


def assert_same(parts, new, slots, **how):
    ours, theirs = by_kernel(parts, new, slots, **how), by_reference(parts, new, slots)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    return pairs


@pytest.mark.parametrize(("bits", "slots"), [(1, 256), (2, 384), (3, 896), (4, 64), (8, 2112)])
def test_equals_the_reference(bits, slots):
    """Each width, 3 in two planes; a block alone, pieces that are not whole, and a last block that is not."""
    parts = (coded(bits, slots),)
    assert mosaic_tpu.unsupported(parts, 24, 1, CHIP) is None
    assert_same(parts, (coded(bits, 24, seed=2),), drawn(slots, 24))


def test_all_tokens_of_a_byte_are_replaced_and_all_others_stay():
    parts, new = (coded(2, 128),), (coded(2, 8, seed=2),)
    slots = jnp.broadcast_to(jnp.asarray([4, 5, 6, 7, 127, 0, -1, 64], jnp.int32), (2, 2, 8))
    (pair, *_) = assert_same(parts, new, slots)
    changed = (np.asarray(pair[0]) != np.asarray(parts[0].planes[0])).any(axis=(0, 1, 3))
    assert set(np.flatnonzero(changed)) == {0, 1, 16, 31}


def test_more_tokens_than_lanes_and_none():
    new = (coded(4, 136, seed=2),)
    for slots in (drawn(256, 136), jnp.full((2, 2, 136), -1, jnp.int32)):
        assert_same((coded(4, 256),), new, slots)


def test_parts_that_hold_floats_beside_codes_and_heads_that_share_stored_numbers():
    old, new = coded(4, 64, heads=1), coded(4, 8, heads=1, seed=2)
    floats = [
        Coded(planes=(jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, n, 4)), jnp.float32),)) for n in (64, 8)
    ]
    turn = {"basis": jnp.ones((2, 16, 8)), "mean": None, "frequencies": (1.0,) * 4}
    slots = jnp.repeat(drawn(64, 8, heads=1), 2, axis=1)
    assert_same((Rotated(parts=(old,), **turn), floats[0]), (Rotated(parts=(new,), **turn), floats[1]), slots)


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        assert_same((coded(4, 64, size=128),), (coded(4, 8, size=128, seed=2),), drawn(64, 8), interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("heads", [2, 3])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(heads, monkeypatch):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda *facts: None)
    monkeypatch.setattr(mosaic_tpu, "put_fields", functools.partial(mosaic_tpu.put_fields, interpret=True))
    parts, new, slots = (coded(2, 128, heads=heads),), (coded(2, 8, heads=heads, seed=2),), drawn(128, 8, heads=heads)
    ours = jax.jit(functools.partial(put_slots, mesh=mesh))(parts, new, slots)
    theirs = by_reference(parts, new, slots)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "NVIDIA H200"}, "it runs on TPUs, and this is NVIDIA H200"),
        ({"unit": 32}, "units of 32 slots move together"),
        ({"parts": (Coded(planes=(jnp.zeros((1, 1, 32, 8)),)),)}, "there are no packed codes"),
        ({"num_new": 2048}, "2048 tokens come at once, more than 1024"),
        ({"parts": (coded(4, 528, size=2),)}, "264 bytes a channel do not fill tiles of 32"),
        ({"parts": (coded(4, 8, size=2048),)}, "tokens have 2048 numbers, more than 1024"),
    ],
)
def test_what_is_not_served_says_why(changes, reason):
    given = {"parts": (coded(4, 64),), "num_new": 8, "unit": 1, "device": CHIP} | changes
    assert reason in mosaic_tpu.unsupported(**given)


@pytest.mark.parametrize(
    ("num_bytes", "block", "piece"), [(32, 32, 32), (96, 96, 32), (1024, 1024, 128), (1056, 1024, 128), (112, 112, 112)]
)
def test_steps_and_pieces(num_bytes, block, piece):
    assert mosaic_tpu.block_of(num_bytes) == block
    assert mosaic_tpu.piece_of(block) == piece


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for(topology):
    assert compile_cases("kernels_pallas.slots.cases", topology) == [case.name for case in CASES]
