"""Masses by the kernel against the reference's second walk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention import api, mosaic_floats, mosaic_tpu, reference
from kernels_pallas.decode_attention.reference import MASSES
from tests.kernels_pallas.decode_attention.masses import assert_near, totals_of
from tests.kernels_pallas.decode_attention.parts import FORMS, made, of_bits, of_floats


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in few slots."""
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 256)
    monkeypatch.setattr(mosaic_floats, "_BLOCK_SLOTS", {4: 256, 2: 256})


def compare(segment, query_positions, tolerance, *, mesh=None, interpret=True, masses=("sum",)):
    given = query_positions, segment.queries.shape[3] ** -0.5, totals_of(segment, query_positions)
    assert mosaic_tpu.mass_unsupported(segment) is None
    for mass in masses:
        ours = mosaic_tpu.mass(segment, *given, mass, interpret=interpret, mesh=mesh)
        assert_near(ours, reference.mass_of(segment, *given, mass), tolerance, mass)
    return np.asarray(ours)


@pytest.mark.parametrize(
    ("maker", "tolerance", "changes"),
    [
        (of_floats("float32"), 2e-6, {"batch": 2, "tokens": 3}),
        (of_floats("bfloat16"), 2e-2, {"stored": 8, "group": 1}),
        (of_bits(4), 5e-4, {"tokens": 16, "group": 1, "slots": 520}),
        (of_bits(3), 5e-4, {"own": True, "size": 80}),
        (of_bits(2, **FORMS["by channel"]), 2e-2, {}),
        (of_bits(4, **FORMS["channels"]), 5e-4, {"stored": 12, "group": 1, "slots": 256}),
    ],
)
def test_equals_the_reference(maker, tolerance, changes):
    compare(*made(maker, of_floats("float32"), **changes), tolerance)


@pytest.mark.parametrize("mass", MASSES)
def test_of_a_pool_each_slot_counts_for_the_head_that_sees_it(mass):
    segment, positions = made(of_bits(4), of_floats("float32"), stored=1, group=8, tokens=2, slots=512)
    owners = jnp.asarray(np.random.default_rng(3).integers(0, 4, (1, 1, 512)), jnp.int32)
    compare(dataclasses.replace(segment, owners=owners, num_kv_heads=4), positions, 5e-4, masses=(mass,))


def test_rows_that_end_apart_padding_and_blocks_that_nobody_sees():
    segment, _ = made(of_bits(4), of_floats("float32"), batch=2, tokens=2)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=segment.queries.shape[:3]), jnp.float32)
    positions = jnp.asarray([[3, 300], [-1, -1]], jnp.int32)
    found = compare(dataclasses.replace(segment, bias=bias), positions, 5e-4, masses=MASSES)
    assert (found[1] == 0).all()
    assert (found[0, :, 512:] == 0).all()


def test_over_a_mesh_each_device_runs_it_on_what_it_has():
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    compare(*made(of_floats("float32"), of_floats("float32"), batch=2), 1e-5, mesh=mesh)


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        compare(*made(of_bits(4), of_bits(4), slots=520), 5e-4, interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_heads_that_share_stored_keys_are_left_to_the_reference():
    segment, _ = made(of_bits(4), of_bits(4))
    shared = dataclasses.replace(segment, num_kv_heads=4)
    assert mosaic_tpu.mass_unsupported(shared) == "heads share their stored keys"


def test_on_a_cpu_masses_are_the_references():
    segment, positions = made(of_bits(4), of_bits(4))
    given = {"query_positions": positions, "scale": 0.125, "mass": "sum"}
    (ours,), (theirs,) = api.decode_attention((segment,), **given), reference.decode_attention((segment,), **given)
    np.testing.assert_array_equal(ours.mass, theirs.mass)


@pytest.mark.parametrize("maker", [of_bits(4), of_floats("float32")])
def test_without_values_a_walk_gives_what_the_weights_come_to(maker):
    segment, query_positions = made(maker, of_floats("float32"), tokens=2)
    given = dataclasses.replace(segment, values=()), query_positions, 0.125
    assert mosaic_tpu.unsupported(given[0], "TPU v6 lite") is None
    output, maximum, total = mosaic_tpu.walk(*given, interpret=True)
    _, *wanted = reference.walk(segment, *given[1:])
    assert output.shape == (*maximum.shape, 0)
    np.testing.assert_allclose(maximum + jnp.log(total), wanted[0] + jnp.log(wanted[1]), atol=1e-4)
