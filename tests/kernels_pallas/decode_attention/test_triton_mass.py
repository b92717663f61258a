"""Masses by the GPU's kernel against the reference's second walk, and what the compiler makes of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import api, reference, triton_gpu, triton_mass
from kernels_pallas.decode_attention.reference import MASSES
from tests.cuda import needs_cuda
from tests.kernels_pallas.decode_attention.gpu_cases import CHIP, in_parts, made, resources_of
from tests.kernels_pallas.decode_attention.masses import assert_near, totals_of

EXACT, ROUNDED = 5e-6, 2e-3  # of the largest mass; numbers and queries are float16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Several blocks for each of several splits."""
    monkeypatch.setattr(triton_gpu, "_WARPS", 16)


def compare(segment, query_positions, tolerance=ROUNDED, *, masses=("sum",), **options):
    """Ours and the reference's, and what was found last."""
    assert triton_gpu.unsupported(segment, CHIP) is None
    given = query_positions, segment.queries.shape[3] ** -0.5, totals_of(segment, query_positions)
    for kind in masses:
        ours = triton_mass.mass(segment, *given, kind, interpret=True, **options)
        assert_near(ours, reference.mass_of(segment, *given, kind), tolerance, kind)
    return np.asarray(ours)


KINDS = [
    ("float32", {"batch": 2, "tokens": 3}, EXACT),
    ("bfloat16", {"group": 1, "slots": 117, "heads": 2}, ROUNDED),
    ("float8_e4m3fn", {"slots": 117}, ROUNDED),
    ("int8", {"tokens": 2}, ROUNDED),
    ("int4", {"tokens": 16, "group": 5, "size": 80, "slots": 152, "stored": 1}, ROUNDED),
    ("int3", {"heads": 2}, ROUNDED),
    ("table4", {}, ROUNDED),
    ("channel2", {}, ROUNDED),
    ("group4", {"group": 1}, ROUNDED),
    ("token2", {"size": 256, "stored": 1}, ROUNDED),
]


@pytest.mark.parametrize(("kind", "changes", "tolerance"), KINDS)
def test_equals_the_reference(kind, changes, tolerance):
    """Every way in which keys are kept; more rows than one product takes; NaN in what is empty."""
    compare(*made(kind, "float32", **{"batch": 1, **changes}), tolerance)


@pytest.mark.parametrize("keys", [(("int2", 32), ("int4", 32)), (("bfloat16", 32), ("int4", 32))])
def test_parts_follow_each_other(keys):
    compare(*in_parts(keys, (("float32", 64),), batch=1))


@pytest.mark.parametrize("mass", MASSES)
def test_of_a_pool_each_slot_counts_for_the_head_that_sees_it(mass):
    segment, positions = made("int4", "float32", stored=1, group=12, tokens=2)
    owners = jnp.asarray(np.random.default_rng(3).integers(0, 4, segment.positions.shape), jnp.int32)
    compare(dataclasses.replace(segment, owners=owners, num_kv_heads=3), positions, masses=(mass,))


@pytest.mark.parametrize("tokens", [1, 2])
def test_heads_that_share_stored_keys_have_masses_of_their_own(tokens):
    segment, positions = made("int4", "float32", tokens=tokens)
    compare(dataclasses.replace(segment, num_kv_heads=4), positions, masses=("sum", "peak"))


def test_rows_that_end_apart_padding_and_blocks_that_nobody_sees():
    """Of more rows of queries than one product takes, too."""
    segment, _ = made("int4", "float32", tokens=2)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=segment.queries.shape[:3]), jnp.float32)
    positions = jnp.asarray([[3, 100], [-1, -1]], jnp.int32)
    found = compare(dataclasses.replace(segment, bias=bias), positions, masses=MASSES)
    assert (found[1] == 0).all()
    assert (found[0, :, 104:] == 0).all()


def test_the_weights_of_all_slots_come_to_one_for_each_token():
    segment, positions = made("int4", "float32", group=3)  # five of eight rows are of nobody
    found = compare(segment, positions)
    np.testing.assert_allclose(found.sum(axis=2), 1, rtol=1e-3)


def test_over_a_mesh_each_device_runs_it_on_what_it_has():
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    compare(*made("float32", batch=2), EXACT, mesh=mesh)


def test_the_choice_of_attention_decides():
    segment, _ = made("int4")
    shared = dataclasses.replace(segment, num_kv_heads=4)
    assert api.choose_for(segment, CHIP, mass=True).name == "triton_gpu"
    assert api.choose_for(shared, CHIP, mass=True).name == "triton_gpu"
    assert api.choose_for(shared, "TPU v6 lite", mass=True).reasons == ("mosaic_tpu: heads share their stored keys",)
    assert api.choose_for(segment, "cpu", mass=True).name == "reference"


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize(("kind", "changes", "tolerance"), KINDS)
def test_a_gpu_gets_what_a_cpu_does(kind, changes, tolerance):
    """Not interpreted, where a GPU is at hand; the reference runs on the CPU, whose float32 is not rounded."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    segment, positions = made(kind, "float32", **{"batch": 1, **changes})
    totals, scale = totals_of(segment, positions), segment.queries.shape[3] ** -0.5
    names = ("queries", "keys", "positions")

    def by(function, kind):
        def of_arrays(arrays, positions, maximum, total, seen):
            totals = reference.Totals(maximum, total, seen)
            return function(dataclasses.replace(segment, **arrays), positions, scale, totals, kind)

        arrays = {name: getattr(segment, name) for name in names}, positions, *dataclasses.astuple(totals)
        return jax.jit(of_arrays), arrays

    for mass in MASSES:
        function, arrays = by(triton_mass.mass, mass)
        ours = function(*arrays)
        function, arrays = by(reference.mass_of, mass)
        assert_near(ours, function(*jax.device_put(arrays, jax.devices("cpu")[0])), max(tolerance, 1e-4), mass)


@needs_cuda
@pytest.mark.parametrize("name", ["bf16", "f32", "int8", "int4", "int2", "lloyd4", "kivi2", "int4.t16"])
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources_of("attention_mass", name, tmp_path, record_property)
    assert registers <= 255
    assert spilled == 0
