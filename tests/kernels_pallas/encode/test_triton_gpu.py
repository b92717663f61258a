"""The GPU kernel in interpret mode against the reference, what it does not serve, and what a compiler for an H200 makes
of it.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.encode import Integers, encode, reference, triton_gpu
from kernels_pallas.encode.api import choose, choose_for
from kernels_pallas.encode.cases import RULES
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.encode.test_mosaic_tpu import ALL, assert_same, by_reference, drawn

CHIP = "NVIDIA H200"
KIVI = Integers(bits=2, token_group=32)
GROUPS = {
    "kivi2": KIVI,
    "kivi3": Integers(bits=3, token_group=16, symmetric=True),
    "group2": Integers(bits=2, channel_group=32),
    "group8": Integers(bits=8, channel_group=16, clip=0.9),
}


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def by_kernel(numbers, rule, basis=None, interpret=True):
    planes, scale, offset = triton_gpu.encode(numbers, rule, basis=basis, interpret=interpret)
    return reference.coded(planes, scale, offset, rule)


@pytest.mark.parametrize("name", [*ALL, *GROUPS])
def test_equals_the_reference(name):
    """With the very sums of the reference, every code; rows of tokens that are no whole block."""
    rule = (ALL | GROUPS)[name]
    numbers = drawn(1, 2, 96, 64)
    assert triton_gpu.unsupported(numbers.shape, numbers.dtype, rule, CHIP) is None
    ours, theirs = by_kernel(numbers, rule), by_reference(numbers, rule)
    assert_same(ours, theirs, most=1e-4)
    assert (ours.token_group, ours.num_slots) == (theirs.token_group, 96)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"), [("int8", (1, 1, 2120, 16), "bfloat16"), ("half4", (2, 1, 8, 256), "float16")]
)
def test_sizes_and_dtypes(name, shape, dtype):
    """Several programs of a head, the last of which is not whole, and numbers of half the width."""
    numbers = drawn(*shape, dtype=dtype) if dtype == "bfloat16" else drawn(*shape).astype(dtype) * 1e-3
    assert_same(by_kernel(numbers, RULES[name]), by_reference(numbers, RULES[name]), most=1e-4)


@pytest.mark.parametrize("own", ["none", "head", "sequence"])
def test_a_transform_comes_first(own):
    numbers = drawn(2, 4, 16, 64)
    sizes = {"none": (), "head": (4,), "sequence": (2, 4)}[own]
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(*sizes, 64, 64)))[0][..., :32]
    basis, rule = jnp.asarray(basis, jnp.float32), RULES["half4"]
    assert triton_gpu.unsupported(numbers.shape, numbers.dtype, rule, CHIP, basis=basis.shape) is None
    assert_same(by_kernel(numbers, rule, basis), by_reference(numbers, rule, basis), most=1e-3)


def test_numbers_are_rounded_to_the_nearest_even():
    numbers = np.concatenate([np.arange(-300, 300) / 4, np.random.default_rng(0).normal(size=1000) * 100])
    numbers = jnp.asarray(numbers, jnp.float32)
    near = jnp.concatenate([numbers, jnp.nextafter(numbers, jnp.full_like(numbers, jnp.inf))])
    np.testing.assert_array_equal(jax.jit(triton_gpu._round)(near), jnp.round(near))
    assert triton_gpu._round(jnp.float32(1e30)) == 2.0**21


@pytest.mark.parametrize("own", ["none", "head", "sequence"])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(own, monkeypatch):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(triton_gpu, "unsupported", lambda *facts, basis: None)
    monkeypatch.setattr(triton_gpu, "encode", functools.partial(triton_gpu.encode, interpret=True))
    numbers, rule = drawn(2, 2, 16, 32), RULES["minmax4"]
    sizes = {"none": (), "head": (2,), "sequence": (2, 2)}[own]
    basis = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(*sizes, 32, 32)))[0], jnp.float32)
    assert choose(numbers, rule, mesh=mesh).name == "triton_gpu"
    ours = jax.jit(functools.partial(encode, rule=rule, mesh=mesh))(numbers, basis=basis)
    assert_same(ours, by_reference(numbers, rule, basis), most=1e-3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "TPU v6 lite"}, "it runs on NVIDIA GPUs, and this is TPU v6 lite"),
        ({"dtype": jnp.dtype("int32")}, "numbers are int32"),
        ({"shape": (1, 1, 128, 80)}, "80 numbers share a scale, no power of two from 16 to 1024"),
        ({"basis": (128, 96)}, "96 numbers share a scale, no power of two from 16 to 1024"),
        ({"rule": Integers(bits=2, channel_group=8)}, "8 numbers share a scale, no power of two from 16 to 1024"),
        (
            {"rule": Integers(bits=2, token_group=48)},
            "48 tokens share scales: no power of two, or more than 16384 numbers",
        ),
        ({"rule": Integers(bits=2, token_group=256)}, "256 tokens share scales: no power of two, or more than 16384"),
        ({"shape": (64, 8, 1 << 15, 128)}, "there are 2**31 numbers or more"),
    ],
)
def test_what_is_not_served_says_why(changes, reason):
    given = {"shape": (1, 1, 128, 128), "dtype": jnp.dtype("float32"), "rule": RULES["int8"], "device": CHIP} | changes
    assert triton_gpu.unsupported(**given).startswith(reason)


def test_the_choice_on_a_gpu():
    numbers = jax.ShapeDtypeStruct((1, 8, 128, 128), jnp.float32)
    assert choose_for(numbers, KIVI, CHIP).name == "triton_gpu"
    assert choose_for(numbers, Integers(bits=2, token_group=256), CHIP).name == "reference"


@pytest.mark.parametrize(
    ("rule", "slots", "size", "expected"),
    [
        (RULES["int8"], 8192, 128, (1, 16, 128, 4)),
        (RULES["half4"], 8, 64, (2, 4, 64, 1)),
        (RULES["table3"], 8192, 1024, (8, 2, 1024, 4)),
        (KIVI, 8192, 128, (4, 8, 128, 2)),
        (Integers(bits=2, token_group=128), 8192, 128, (4, 32, 128, 8)),
        (GROUPS["group2"], 8192, 128, (4, 64, 32, 4)),
    ],
)
def test_how_numbers_are_cut(rule, slots, size, expected):
    plan = triton_gpu.plan_for(rule, num_slots=slots, size=size)
    assert (plan.fields, plan.rows, plan.width, plan.num_warps) == expected


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize("name", [*ALL, *GROUPS])
def test_a_gpu_stores_what_a_cpu_does(name):
    """Its quotients and roots are a step of a float32 beside the CPU's."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    rule, numbers = (ALL | GROUPS)[name], drawn(2, 8, 1056, 128)
    there = jax.device_put(numbers, jax.devices("cpu")[0])
    assert_same(by_kernel(numbers, rule, interpret=False), by_reference(there, rule), most=1e-4)


CASES = {
    **{name: RULES[name] for name in ("int8", "minmax4", "half4", "table4", "table3")},
    "kivi2": KIVI,
    "kivi2.t128": Integers(bits=2, token_group=128),
    "group2": GROUPS["group2"],
}


@needs_cuda
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources(__file__, name, tmp_path, record_property)
    assert registers <= 255
    assert spilled == 0


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    function = functools.partial(triton_gpu.encode, rule=CASES[name])
    compile_kernel(function, [jax.ShapeDtypeStruct((8, 8, 1024, 128), jnp.float32)], name="encode", folder=folder)
