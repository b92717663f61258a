"""The GPU kernel in interpret mode against the reference, what it does not serve, and what a compiler makes of it."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, Rotated
from kernels_pallas.score import StoredKeys, api, reference, triton_gpu
from kernels_pallas.score.cases import Case
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.decode_attention.parts import FORMS, LEVELS, of_bits, of_floats
from tests.kernels_pallas.score.given import assert_close, given, rotation

CHIP = "NVIDIA H200"
LENGTHS, PRODUCTS = 5e-3, 1e-3
KIVI = of_bits(2, **FORMS["by channel"])
by_reference = jax.jit(reference.score)
by_kernel = jax.jit(functools.partial(triton_gpu.score, interpret=True))


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Several blocks for each of several splits."""
    monkeypatch.setattr(triton_gpu, "_WARPS", 16)


def compare(keys, rows, weights, tolerance=LENGTHS):
    num_heads = (weights if rows is None else rows).shape[1]
    assert triton_gpu.unsupported(keys, num_heads, CHIP) is None
    ours = np.asarray(by_kernel(keys, rows, weights))
    assert_close(ours, np.asarray(by_reference(keys, rows=rows, weights=weights)), tolerance)
    return ours


KINDS = {
    "float32": (of_floats("float32"), {"size": 64, "slots": 117}),
    "bfloat16": (of_floats("bfloat16"), {"size": 128, "group": 1, "own": True}),
    "bfloat16, turned": (of_floats("bfloat16"), {"size": 64, "basis": rotation(64, 64), "slots": 117}),
    "float8": (of_floats("float8_e4m3fn"), {"size": 64}),
    "int8": (of_bits(8), {"size": 64, "group": 1, "batch": 2}),
    "int8, turned": (of_bits(8), {"size": 64, "basis": rotation(64, 64), "group": 16, "stored": 1}),
    "int4": (of_bits(4), {"size": 128, "slots": 258, "mean": (2, 128)}),
    "int4, turned": (of_bits(4), {"size": 128, "basis": rotation(128, 128), "slots": 258}),
    "int4, each head turned": (of_bits(4), {"basis": rotation(2, 32, 32), "mean": (2, 32), "batch": 2}),
    "int4, each sequence turned": (of_bits(4), {"basis": rotation(2, 2, 32, 32), "mean": (2, 2, 32), "batch": 2}),
    "table4, turned": (of_bits(4, levels=LEVELS), {"size": 64, "basis": 3.0 * rotation(1, 2, 64, 64), "group": 1}),
    "int3, fewer numbers": (of_bits(3), {"size": 48, "basis": rotation(64, 64)[:, :48], "own": True}),
    "int4, a small transform of 80": (of_bits(4), {"size": 80, "basis": 1e-4 * rotation(80, 80)}),
    "kivi": (KIVI, {"size": 64, "slots": 256}),
    "kivi, turned": (KIVI, {"slots": 256, "basis": rotation(32, 32)}),
    "groups": (of_bits(4, **FORMS["channels"]), {"size": 128, "mean": (1, 2, 128)}),
    "groups, turned": (of_bits(4, **FORMS["channels"]), {"size": 64, "basis": rotation(64, 64)}),
    "halves that do not pair": (of_bits(4), {"size": 48}),
    "a group of 16": (of_bits(2, offset=True), {"size": 16}),
}


def of_kind(name):
    make, changes = KINDS[name]
    return given(make, **{"slots": 192} | changes)


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_reference(name):
    compare(*of_kind(name))


@pytest.mark.parametrize("name", ["bfloat16", "int4, each head turned", "kivi"])
def test_each_term_by_itself(name):
    keys, rows, weights = of_kind(name)
    compare(keys, rows, None, PRODUCTS)
    compare(keys, None, weights)


def test_each_length_by_itself():
    for name in ("int8", "int4, each head turned"):
        keys, _, weights = of_kind(name)
        single = jnp.zeros_like(weights).at[0, :, jnp.arange(weights.shape[1]) + 3].set(1.0)
        ours, theirs = compare(keys, None, single), np.asarray(by_reference(keys, rows=None, weights=single))
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.mean())


@pytest.mark.parametrize("basis", [None, rotation(64, 64)])
def test_parts_of_different_kinds_lie_beside_each_other(basis):
    first, second = (given(maker, slots=128)[0] for maker in (of_bits(4), of_floats("bfloat16")))
    keys, rows, weights = given(of_bits(4), size=64, slots=128, basis=basis)
    compare(dataclasses.replace(keys, parts=(*first.parts, *second.parts), positions=first.positions), rows, weights)


@pytest.mark.parametrize("basis", [None, rotation(32, 32)])
def test_of_a_pool_each_slot_counts_for_the_head_that_has_it(basis):
    """Of more rows than one product takes, too."""
    keys, rows, weights = given(of_bits(4), stored=1, heads=5, basis=basis, pool=True, slots=128)
    found = compare(keys, rows, weights)
    counted = (found != 0).reshape(1, 5, 4, -1).all(axis=2).sum(axis=1)
    np.testing.assert_array_equal(counted, np.asarray(keys.positions)[:, 0] >= 0)


def test_heads_that_share_what_is_stored_have_scores_of_their_own():
    compare(*given(of_bits(4), stored=2, heads=4, basis=rotation(32, 32), slots=128, group=3))


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_behind_the_last_key_are_zeros(weighted):
    keys, rows, weights = given(of_bits(4), batch=2, slots=768)
    positions = keys.positions.at[0, :, 40:].set(-1).at[1].set(-1)
    found = compare(dataclasses.replace(keys, positions=positions), rows, weights if weighted else None)
    assert (found[0, :, :40] != 0).any()
    assert (found[0, :, 40:] == 0).all()
    assert (found[1] == 0).all()


def _but(changes, name):
    return {key: value for key, value in changes.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "change", "reason"),
    [
        (
            {},
            lambda keys: dataclasses.replace(
                keys, parts=(Rotated(parts=keys.parts, basis=None, mean=None, frequencies=(1.0,) * 16),)
            ),
            "keys are turned when they are read",
        ),
        ({"size": 24}, lambda keys: keys, "keys have 24 numbers"),
        ({"size": 512, "slots": 64}, lambda keys: keys, "keys have 512 numbers, more than 256"),
        ({"stored": 1, "heads": 2, "mean": (2, 32)}, lambda keys: keys, "turn it back each in its own way"),
        (
            {"stored": 1, "heads": 2},
            lambda keys: dataclasses.replace(keys, positions=jnp.repeat(keys.positions, 2, axis=1)),
            "heads that hold tokens of their own share stored keys",
        ),
        ({"size": 256, "basis": rotation(256, 256)}, lambda keys: keys, "keys have 256 numbers, more than 128"),
        ({"make": of_floats("float32"), "basis": rotation(32, 32)}, lambda keys: keys, "float32 and turned back"),
        ({"group": 257}, lambda keys: keys, "257 queries share a head"),
    ],
)
def test_what_it_does_not_serve(changes, change, reason):
    keys, rows, _ = given(changes.get("make", of_bits(8)), **{"slots": 128} | _but(changes, "make"))
    assert reason in triton_gpu.unsupported(change(keys), rows.shape[1], CHIP)
    assert triton_gpu.unsupported(keys, rows.shape[1], "cpu") == "it runs on NVIDIA GPUs, and this is cpu"


def test_the_choice_on_a_gpu():
    keys, rows, _ = of_kind("int4, turned")
    assert api.choose_for(keys, rows.shape[1], CHIP).name == "triton_gpu"
    assert api.choose_for(keys, rows.shape[1], CHIP, implementation="triton_gpu").name == "triton_gpu"
    wide, rows, _ = given(of_bits(8), size=512, slots=64)
    choice = api.choose_for(wide, rows.shape[1], CHIP)
    assert choice.name == "reference"
    assert choice.reasons[1].startswith("triton_gpu: keys have 512 numbers")


def test_plans():
    """Floats and codes that are the keys' own are read as attention reads them, and four warps turn keys back."""
    plans = {
        name: triton_gpu.plan_for(case.keys(), 64, weighted=True)
        for name, case in (("turned", Case(4)), ("own", Case(4, rotated=False)), ("floats", Case(16, rotated=False)))
    }
    assert (plans["turned"].rows, plans["turned"].num_warps, plans["turned"].fields) == (64, 4, 2)
    assert [piece.place for piece in plans["own"].key_groups[0][0]] == [0, 64, 1, 65]
    assert [piece.place for piece in plans["floats"].key_groups[0][0]] == [0, 64]


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4", "int4, turned", "table4, turned", "kivi"])
def test_a_gpu_gets_what_a_cpu_does(name):
    """Not interpreted, where a GPU is at hand; the reference runs on the CPU, whose float32 is not rounded."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    keys, rows, weights = of_kind(name)
    there = jax.device_put((keys, rows, weights), jax.devices("cpu")[0])
    ours = jax.jit(triton_gpu.score)(keys, rows, weights)
    assert_close(ours, np.asarray(by_reference(there[0], rows=there[1], weights=there[2])), LENGTHS)


def _kivi():
    shape, size = jax.ShapeDtypeStruct, (8, 8, 512, 128)
    scale = shape(size, jnp.float16)
    part = Coded(
        planes=(shape((8, 8, 4096, 128), jnp.int8),), bits=2, scale=scale, offset=scale, shift=2.0, token_group=32
    )
    return StoredKeys(parts=(part,), positions=shape((8, 8, 16_384), jnp.int32), num_kv_heads=8)


def _changed(case, **changes):
    return dataclasses.replace(case.keys(), **changes)


CASES = {
    "bf16": (Case(16, rotated=False).keys(), 4),
    "bf16.rotated": (Case(16).keys(), 4),
    "f32": (StoredKeys.of_array(jax.ShapeDtypeStruct((8, 8, 16_384, 128), jnp.float32), _kivi().positions), 4),
    "int8": (Case(8, rotated=False).keys(), 4),
    "int8.rotated": (Case(8).keys(), 4),
    "int4": (Case(4, rotated=False).keys(), 4),
    "int4.rotated": (Case(4).keys(), 4),
    "int4.g8.rotated": (Case(4).keys(), 8),
    "int4.d256": (Case(4, size=256, rotated=False).keys(), 4),
    "int4.d64.rotated": (Case(4, size=64).keys(), 1),
    "int4.heads": (_changed(Case(4), basis=jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)), 4),
    "int4.mean": (_changed(Case(4), mean=jax.ShapeDtypeStruct((8, 128), jnp.float32)), 4),
    "lloyd4.rotated": (Case(4, table=True).keys(), 4),
    "int3.rotated": (Case(3).keys(), 4),
    "int2.rotated": (Case(2).keys(), 4),
    "kivi2": (_kivi(), 4),
    "kivi2.rotated": (dataclasses.replace(_kivi(), basis=jax.ShapeDtypeStruct((128, 128), jnp.float32)), 4),
}


@needs_cuda
@pytest.mark.parametrize("name", CASES)
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources([__file__, name], tmp_path, record_property)
    assert registers <= 255
    assert spilled == 0


def compile_case(name, folder):
    """Compiles a case for an H200; in a process of its own."""
    keys, group = CASES[name]
    size = triton_gpu.keys_size(keys)
    rows = jax.ShapeDtypeStruct((8, 8 * group, size), jnp.float32)
    weights = jax.ShapeDtypeStruct((1, 8 * group, size // 2), jnp.float32)
    compile_kernel(triton_gpu.score, (keys, rows, weights), name="score", folder=folder)


if __name__ == "__main__":
    compile_case(*sys.argv[1:])
