"""The GPU kernel in interpret mode keeps the same slots as the reference, bit for bit, says what it does not serve, and
what the compiler for an H200 that is not there makes of it.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select import reference, select, triton_gpu
from kernels_pallas.select.api import choose, choose_for
from tests.cuda import compile_kernel, needs_cuda, resources
from tests.kernels_pallas.select.test_mosaic_tpu import drawn

CHIP = "NVIDIA H200"


@functools.partial(jax.jit, static_argnames=("search",))
def kept(scores, protected, recency, budgets, *, search=reference.thresholds):
    return reference.select(scores, protected=protected, recency=recency, budgets=budgets, search=search)


by_interpreter = functools.partial(triton_gpu.thresholds, interpret=True)


def assert_same(arrays, *, search=by_interpreter):
    arrays = tuple(map(jnp.asarray, arrays))
    ours, theirs = np.asarray(kept(*arrays, search=search)), np.asarray(kept(*arrays))
    np.testing.assert_array_equal(ours, theirs)
    return ours


@pytest.mark.parametrize("shape", [(1,), (61,), (3, 128), (2, 3, 257)])
@pytest.mark.parametrize("values", [None, 2])
def test_equals_the_reference(shape, values):
    """Rows that fill no block, and scores that tie."""
    assert triton_gpu.unsupported(shape, CHIP) is None
    for seed in range(3):
        scores, protected, recency, budgets = drawn(shape, seed=seed, values=values)
        ours = assert_same((scores, protected, recency, budgets))
        np.testing.assert_array_equal(ours.sum(-1), np.minimum((recency >= 0).sum(-1), budgets))


@pytest.mark.parametrize("budget", [-1, 0, 1, 5, 60, 61, 1000])
def test_budgets_of_none_of_all_and_of_more(budget):
    """The smallest are less than what is protected, whose keys tie at the highest there is."""
    scores, protected, recency, budgets = drawn((4, 61), seed=budget + 1)
    ours = assert_same((scores, protected, recency, np.full_like(budgets, budget)))
    np.testing.assert_array_equal(ours.sum(-1), np.clip(budget, 0, (recency >= 0).sum(-1)))


def test_scores_that_are_no_numbers_zeros_of_both_signs_and_neighbours():
    numbers = np.asarray([0.0, -0.0, 1e-45, -1e-45, 3e38, -3.4028235e38, 1.0], np.float32)
    above = np.nextafter(numbers, np.float32(np.inf))
    row = np.tile(np.concatenate([numbers, above, np.asarray([np.nan, np.inf, -np.inf], np.float32)]), 2)
    count = row.size
    for protect in (False, True):
        protected = np.tile((np.arange(count) % 7 == 2) & protect, (count + 2, 1))
        ages = np.tile(np.arange(count, dtype=np.int32)[::-1], (count + 2, 1))
        ages[:, 5] = -1
        assert_same((np.tile(row, (count + 2, 1)), protected, ages, np.arange(count + 2, dtype=np.int32)))


def test_the_highest_ages_there_are():
    recency = np.asarray([[2**31 - 2, 2**31 - 3, 0, 2**30, 2**30 - 1]] * 6, np.int32)
    zeros = np.zeros(recency.shape, np.float32)
    assert_same((zeros, zeros > 0, recency, np.arange(6, dtype=np.int32)))


@pytest.mark.parametrize("values", [None, 3])
def test_longer_rows_are_read_again_block_by_block(values, monkeypatch):
    monkeypatch.setattr(triton_gpu, "_MOST_HELD", 64)
    monkeypatch.setattr(triton_gpu, "_BLOCK", 64)
    assert_same(drawn((3, 300), values=values), search=lambda *given: by_interpreter(*given))


def test_over_a_mesh_each_device_runs_it_on_what_it_has(monkeypatch):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(triton_gpu, "unsupported", lambda shape, device: None)
    monkeypatch.setattr(triton_gpu, "thresholds", by_interpreter)
    scores, protected, recency, budgets = map(jnp.asarray, drawn((3, 4, 2, 50), values=3))
    assert choose(scores.shape, mesh=mesh).name == "triton_gpu"
    ours = jax.jit(functools.partial(select, mesh=mesh))(scores, protected=protected, recency=recency, budgets=budgets)
    np.testing.assert_array_equal(ours, kept(scores, protected, recency, budgets))


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
    assert_same(drawn(shape, values=values), search=triton_gpu.thresholds)


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
