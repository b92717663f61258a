"""The kernel in interpret mode against the reference, and what it does not serve."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.coded import Rotated
from kernels_pallas.decode_attention import mosaic_floats
from kernels_pallas.score import mosaic_tpu, reference
from kernels_pallas.score.cases import CASES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.kernels_pallas.decode_attention.parts import FORMS, LEVELS, of_bits, of_floats
from tests.kernels_pallas.score.given import assert_close, given, rotation
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"
LENGTHS, PRODUCTS = 5e-3, 2e-5
by_reference = jax.jit(reference.score)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks in few slots."""
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 128)
    monkeypatch.setattr(mosaic_floats, "_BLOCK_SLOTS", {4: 256, 2: 256})


def compare(keys, rows, weights, tolerance=LENGTHS, *, chip=CHIP, interpret=True):
    num_heads = (weights if rows is None else rows).shape[1]
    assert mosaic_tpu.unsupported(keys, num_heads, chip) is None
    ours = np.asarray(mosaic_tpu.score(keys, rows, weights, device=chip, interpret=interpret))
    assert_close(ours, np.asarray(by_reference(keys, rows=rows, weights=weights)), tolerance)
    return ours


@pytest.mark.parametrize(
    ("maker", "changes"),
    [
        (of_floats("float32"), {}),
        (of_floats("bfloat16"), {"own": True, "basis": rotation(32, 32)}),
        (of_floats("float8_e4m3fn"), {"slots": 520}),
        (of_bits(8), {"group": 16, "stored": 1, "batch": 2}),
        (of_bits(4), {"basis": rotation(2, 32, 32), "mean": (2, 32), "batch": 2}),
        (of_bits(4, levels=LEVELS), {"size": 128, "basis": rotation(1, 2, 128, 128)}),
        (of_bits(3), {"basis": rotation(64, 64)[:, :48], "size": 48, "own": True}),
        (of_bits(2, **FORMS["by channel"]), {"slots": 512}),
        (of_bits(4, **FORMS["channels"]), {"basis": rotation(32, 32), "mean": (1, 2, 32)}),
    ],
)
def test_equals_the_reference(maker, changes):
    compare(*given(maker, **changes))


@pytest.mark.parametrize("maker", [of_bits(4), of_bits(3), of_floats("float8_e4m3fn")])
def test_keys_go_to_the_matrix_unit_in_8_bits_where_it_takes_them(maker):
    keys, rows, weights = given(maker, basis=rotation(32, 32), mean=(2, 32))
    assert mosaic_tpu.plan_for(keys, rows.shape[1], "TPU7x").keys[0].dtype == "float8_e4m3fn"
    compare(keys, rows, weights, chip="TPU7x")


def test_products_alone_are_as_near_as_attentions():
    for maker in (of_bits(4), of_floats("bfloat16")):
        keys, rows, _ = given(maker, basis=rotation(32, 32), mean=(2, 32))
        compare(keys, rows, None, PRODUCTS)


def test_lengths_alone_and_each_length_by_itself():
    keys, _, weights = given(of_bits(4), basis=rotation(32, 32))
    compare(keys, None, weights)
    single = jnp.zeros_like(weights).at[0, jnp.arange(8), jnp.arange(8)].set(1.0)  # band n for query head n
    ours = compare(keys, None, single)
    theirs = np.asarray(by_reference(keys, rows=None, weights=single))
    far = np.abs(ours - theirs) > 5e-3 * theirs + 5e-3 * theirs.mean()
    assert far.mean() < 1e-3


def test_parts_of_different_kinds_lie_beside_each_other():
    first, second = (given(maker, size=16, slots=512)[0] for maker in (of_bits(4), of_floats("bfloat16")))
    second = dataclasses.replace(second.parts[0], planes=(jnp.nan_to_num(second.parts[0].planes[0]),))
    keys, rows, weights = given(of_bits(4), slots=512)
    keys = dataclasses.replace(keys, parts=(first.parts[0], second), basis=rotation(32, 32))
    compare(dataclasses.replace(keys, positions=first.positions), rows, weights)


def test_of_a_pool_each_slot_counts_for_the_head_that_has_it():
    keys, rows, weights = given(of_bits(4), stored=1, heads=4, basis=rotation(32, 32), pool=True)
    found = compare(keys, rows, weights)
    assert (
        (found != 0).reshape(1, 4, 4, -1).all(axis=2).sum(axis=1) == np.asarray(keys.positions)[:, 0].clip(-1, 0) + 1
    ).all()


def test_blocks_behind_the_last_key_are_zeros():
    keys, rows, weights = given(of_bits(4), batch=2, slots=768)
    positions = keys.positions.at[0, :, 40:].set(-1).at[1].set(-1)
    found = compare(dataclasses.replace(keys, positions=positions), rows, weights)
    assert (found[0, :, 40:] == 0).all()
    assert (found[1] == 0).all()


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        compare(*given(of_bits(4), slots=520, basis=rotation(32, 32)), interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def _turned(keys):
    return dataclasses.replace(keys, parts=(Rotated(parts=keys.parts, basis=None, mean=None, frequencies=(1.0,) * 16),))


def _in_groups(keys):
    part = dataclasses.replace(keys.parts[0], scale=jnp.zeros((1, 2, 32, 512), jnp.float16))
    return dataclasses.replace(keys, parts=(part,))


@pytest.mark.parametrize(
    ("changes", "change", "reason"),
    [
        ({}, _turned, "keys are turned when they are read"),
        ({"slots": 128}, lambda keys: keys, "there are 128 slots, fewer than 256"),
        ({"size": 24}, lambda keys: keys, "keys have 24 numbers"),
        ({"size": 512, "slots": 256}, lambda keys: keys, "keys have 512 numbers, more than 256"),
        ({"stored": 1, "heads": 2, "mean": (2, 32)}, lambda keys: keys, "turn it back each in its own way"),
        (
            {"stored": 1, "heads": 2},
            lambda keys: dataclasses.replace(keys, positions=jnp.repeat(keys.positions, 2, axis=1)),
            "heads that hold tokens of their own share stored keys",
        ),
        ({"group": 129}, lambda keys: keys, "129 queries share a head"),
        ({"size": 128}, _in_groups, "keys and their groups of channels make 4096 numbers, more than 2048"),
    ],
)
def test_what_it_does_not_serve(changes, change, reason):
    keys, rows, _ = given(of_bits(8), **changes)
    assert reason in mosaic_tpu.unsupported(change(keys), rows.shape[1], CHIP)
    assert mosaic_tpu.unsupported(keys, rows.shape[1], "cpu") == "it runs on TPUs, and this is cpu"


def test_plans_are_attentions_without_values():
    keys, rows, _ = given(of_bits(4), slots=2048)
    plan = mosaic_tpu.plan_for(keys, rows.shape[1], CHIP)
    assert (plan.slots, plan.heads, plan.rows, plan.values) == (256, 2, 8, ())
    assert mosaic_tpu.chunk_of(plan) == 256
    assert mosaic_tpu.chunk_of(dataclasses.replace(plan, slots=1000)) == 1000


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for(topology):
    assert compile_cases("kernels_pallas.score.cases", topology) == [case.name for case in CASES]
