"""Beside what `test_kernels.py` asks of all kernels: a GPU that is there, and what the compiler for an H200 that is not
there makes of it.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.slots import triton_gpu
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.slots.drawn import assert_same, coded, drawn

CHIP = "NVIDIA H200"


@pytest.mark.parametrize(("bits", "slots", "size"), [(2, 96, 24), (8, 70, 32)])
def test_tokens_and_channels_that_are_no_powers_of_two(bits, slots, size):
    parts, new = (coded(bits, slots, size=size),), (coded(bits, 24, size=size, seed=2),)
    assert triton_gpu.unsupported(parts, 24, 1, CHIP) is None
    assert_same(triton_gpu, parts, new, drawn(slots, 24))


def test_planes_of_2_gib_are_not_served():
    plane = jax.ShapeDtypeStruct((32, 8, 1 << 16, 128), jnp.int8)
    parts = (Coded(planes=(plane,), bits=8),)
    assert triton_gpu.unsupported(parts, 8, 1, CHIP) == "a plane takes 2 GiB or more"


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_gpu_writes_what_the_reference_writes(bits):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    parts, new = (coded(bits, 2048, size=128),), (coded(bits, 256, size=128, seed=2),)
    assert_same(triton_gpu, parts, new, drawn(2048, 256), interpret=False)


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
