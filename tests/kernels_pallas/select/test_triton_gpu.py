"""Beside what `test_kernels.py` asks of all kernels: its blocks, a GPU that is there, and what the compiler for an H200
that is not there makes of it.
"""

import sys

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.select import triton_gpu
from kernels_pallas.select.api import choose_for
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.select.drawn import assert_same, drawn

CHIP = "NVIDIA H200"


@pytest.mark.parametrize("values", [None, 3])
def test_longer_rows_are_read_again_block_by_block(values, monkeypatch):
    monkeypatch.setattr(triton_gpu, "_MOST_HELD", 64)
    monkeypatch.setattr(triton_gpu, "_BLOCK", 64)
    assert_same(lambda *given, **how: triton_gpu.thresholds(*given, **how), drawn((3, 300), values=values))


@pytest.mark.parametrize(
    ("shape", "device", "reason"),
    [
        ((8, 100), "TPU v6 lite", "it runs on NVIDIA GPUs, and this is TPU v6 lite"),
        ((8, 1 << 19), CHIP, "524288 slots a row are more than the 262144 that its caches hold"),
    ],
)
def test_what_is_not_served_says_why(shape, device, reason):
    assert triton_gpu.unsupported(shape, device) == reason


def test_the_choice_on_a_gpu():
    assert choose_for((8, 4096), CHIP).name == "triton_gpu"
    assert choose_for((8, 1 << 19), CHIP).name == "reference"


@pytest.mark.parametrize(
    ("slots", "block", "warps"), [(1, 32, 1), (2176, 4096, 8), (16_384, 16_384, 16), (131_072, 8192, 16)]
)
def test_blocks_hold_a_row_as_long_as_registers_do(slots, block, warps):
    assert triton_gpu.block_of(slots) == block
    assert triton_gpu.warps_of(block) == warps
    assert triton_gpu._MOST_SLOTS // triton_gpu._BLOCK < 1 << triton_gpu._DIGITS


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("shape", "values"), [((4, 8, 2176), None), ((8, 16_384), 100), ((3, 100_003), 2000), ((2, 9), 1)]
)
def test_a_gpu_keeps_what_the_reference_keeps(shape, values):
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    assert_same(triton_gpu.thresholds, drawn(shape, values=values), interpret=False)


CASES = {"s2176": (256, 2176), "s16384": (256, 16_384), "s131072": (64, 131_072)}


@needs_cuda
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources([__file__, name], tmp_path, record_property)
    assert registers <= 128  # 512 threads have no more
    assert spilled == 0


if __name__ == "__main__":
    name, folder = sys.argv[1:]
    rows, slots = CASES[name]
    shapes = ((slots, jnp.uint32), (slots, jnp.int32), (1, jnp.int32))
    shapes = [jax.ShapeDtypeStruct((rows, width), dtype) for width, dtype in shapes]
    compile_kernel(triton_gpu.thresholds, shapes, name="select", folder=folder)
