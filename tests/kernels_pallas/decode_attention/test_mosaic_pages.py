"""Pages that the TPU kernel cuts out itself, against the reference over whole segments of which the rest is empty."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention import mosaic_floats, mosaic_pages, mosaic_tpu, reference
from tests.kernels_pallas.decode_attention.parts import FORMS, made, of_bits, of_floats, paged
from tests.kernels_pallas.decode_attention.running import assert_equal, finished

CHIP = "TPU v6 lite"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in few slots, and loops over pages: interpreted, what is written out takes long to compile."""
    monkeypatch.setattr(mosaic_pages, "_ABREAST", 3)
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 256)
    monkeypatch.setattr(mosaic_floats, "_BLOCK_SLOTS", {4: 256, 2: 256})


def compare(segment, query_positions, tolerance, *, page, count, missing=1, device=CHIP, interpret=True):
    own, others_empty = paged(segment, page, count, missing=missing)
    assert mosaic_tpu.unsupported(own, device) is None
    scale = segment.queries.shape[3] ** -0.5

    @jax.jit
    def by_kernel(queries, pages):
        given = dataclasses.replace(own, queries=queries, pages=pages)
        return mosaic_tpu._walk(given, query_positions, scale=scale, device=device, interpret=interpret)

    theirs = jax.jit(functools.partial(reference.walk, others_empty, scale=scale))(query_positions)
    assert_equal(finished(by_kernel(own.queries, own.pages)), finished(theirs), tolerance)


KINDS = {
    "floats in one block": (of_floats("float32"), of_floats("bfloat16"), 2e-2, {}, (16, 7)),
    "several blocks, rows of several tokens": (of_floats("bfloat16"), of_bits(4), 2e-2, {"tokens": 2}, (16, 37)),
    "codes and no pages at the end": (of_bits(4), of_bits(8), 5e-4, {"batch": 1}, (16, 40)),
    "planes": (of_bits(3), of_bits(1), 5e-4, {"batch": 1}, (32, 9)),
    "pages longer than what fits": (of_bits(2), of_bits(4), 5e-4, {"batch": 1, "slots": 1152}, (96, 6)),
    "groups longer than pages": (
        of_bits(2, **FORMS["by channel"]),
        of_bits(4, **FORMS["channels"]),
        2e-2,
        {"batch": 1},
        (16, 20),
    ),
    "8-bit floats of wide heads": (of_floats("float8_e4m3fn"), of_bits(4), 5e-3, {"batch": 1, "size": 256}, (16, 9)),
}


@pytest.mark.parametrize("name", KINDS)
def test_each_head_reads_pages_of_its_own_in_any_order(name):
    """What lies in others, and where an entry names no page, cannot matter, NaN included."""
    keys, values, tolerance, changes, (page, count) = KINDS[name]
    given = {"batch": 2, "size": 128, "slots": 768} | changes
    missing = 16 if "no pages" in name else 1
    compare(*made(keys, values, **given), tolerance, page=page, count=count, missing=missing)


@pytest.mark.parametrize("device", [CHIP, "TPU v5"])
def test_sequences_that_see_little_or_nothing(device):
    """Blocks that are not alive are not copied, and their steps pass on what follows them; on one core and on two."""
    segment, _ = made(of_bits(4), of_floats("float32"), batch=4, size=128)
    positions = jnp.asarray([[300], [-1], [767], [3]], jnp.int32)
    compare(segment, positions, 1e-3, page=16, count=37, device=device)


def test_interpreted_as_a_tpu_copies_arrive_before_they_are_read():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        given = made(of_bits(4), of_floats("bfloat16"), batch=2, size=128)
        compare(*given, 2e-2, page=16, count=20, interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_over_a_mesh_each_device_reads_the_pages_of_its_heads():
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    segment, positions = made(of_floats("float32"), of_floats("float32"), size=128)
    own, others_empty = paged(segment, 16, 9)
    ours = jax.jit(functools.partial(mosaic_tpu.walk, own, scale=0.1, mesh=mesh, interpret=True))(positions)
    assert_equal(finished(ours), finished(reference.walk(others_empty, positions, 0.1)), 1e-5)


def plan_of(segment):
    return mosaic_tpu.plan_for(segment, 1.0, CHIP)


def test_blocks_are_about_equal_and_a_copy_is_what_fits_into_them():
    segment, _ = made(of_bits(4), of_bits(4), size=128)
    plan = plan_of(paged(segment, 16, 39)[0])
    assert (plan.slots, plan.num_blocks, plan.unit) == (512, 2, 16)
    longer = mosaic_pages.fitted(dataclasses.replace(plan, slots=2048, num_slots=2100), 16, one_core=True)
    assert (longer.slots, longer.num_blocks) == (1280, 2)
    assert plan_of(paged(segment, 96, 4)[0]).unit == 32
    floats, _ = made(of_floats("float32"), of_floats("float32"), size=128)
    assert plan_of(paged(floats, 24, 6)[0]).unit == 24
    assert (plan_of(paged(floats, 24, 12)[0]).slots, plan_of(paged(floats, 24, 12)[0]).unit) == (256, 8)


def test_the_list_names_places_in_memory_and_none_outside():
    segment, _ = made(of_bits(4), of_bits(4), size=128)
    own, _ = paged(segment, 96, 4)
    pages = jnp.asarray([[[1, 7, 0, -1], [900, 2, 3, 4]]], jnp.int32)
    found = np.asarray(mosaic_pages.units_of(dataclasses.replace(own, pages=pages), plan_of(own)))
    found = found.reshape(2, -1)
    assert found[0, :12].tolist() == [3, 4, 5, 21, 22, 23, 0, 1, 2, 0, 1, 2]
    assert found[1, :6].tolist() == [21, 22, 23, 6, 7, 8]
    assert not found[:, 12:].any()


@pytest.mark.parametrize(
    ("changes", "page", "reason"),
    [
        ({"size": 64}, 16, "have pages and 64 numbers, which lie with slots on lanes"),
        ({"size": 128}, 4, "have pages of 4 slots, which do not fill words"),
        (
            {"size": 128, "form": FORMS["by channel"]},
            4,
            "have pages whose scales are of 4 tokens, and not of a multiple",
        ),
    ],
)
def test_what_cannot_be_cut_out_says_why(changes, page, reason):
    form = changes.pop("form", {})
    segment, _ = made(of_bits(4, **form), of_bits(4), **changes)
    assert reason in mosaic_tpu.unsupported(paged(segment, page, 8)[0], CHIP)


def test_nor_can_lists_that_are_too_long_pools_or_pages_of_other_heads():
    segment, _ = made(of_bits(4), of_bits(4), size=128)
    own, _ = paged(segment, 16, 8)
    many = dataclasses.replace(
        own,
        pages=jax.ShapeDtypeStruct((1, 2, 70_000), jnp.int32),
        positions=jax.ShapeDtypeStruct((1, 2, 70_000 * 16), jnp.int32),
    )
    assert "there are 560,128 bytes of pages, more than 524,288" in mosaic_tpu.unsupported(many, CHIP)
    others = dataclasses.replace(own, pages=own.pages[:, :1])
    assert "pages are not of as many heads" in mosaic_tpu.unsupported(others, CHIP)
    pool = dataclasses.replace(own, owners=own.positions)
    assert "a pool has pages" in mosaic_tpu.unsupported(pool, CHIP)


def test_masses_of_pages_are_the_references():
    segment, _ = made(of_bits(4), of_bits(4), size=128)
    assert mosaic_tpu.mass_unsupported(paged(segment, 16, 8)[0]) == "pages are read"
