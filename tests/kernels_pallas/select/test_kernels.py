"""What every kernel of the operation does in interpret mode: it keeps the same slots as the reference, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select import mosaic_tpu, select, triton_gpu
from kernels_pallas.select.api import choose
from tests.kernels_pallas.select.drawn import assert_same, drawn, kept

CHIPS = {mosaic_tpu: "TPU v6 lite", triton_gpu: "NVIDIA H200"}


@pytest.fixture(params=CHIPS, ids=lambda kernel: kernel.__name__.rpartition(".")[2])
def kernel(request):
    return request.param


@pytest.mark.parametrize("shape", [(1,), (61,), (3, 128), (2, 3, 257), (9, 130), (72, 40)])
@pytest.mark.parametrize("values", [None, 2])
def test_equals_the_reference(kernel, shape, values):
    """Rows and slots that fill no tile or block, several steps, and scores that tie."""
    assert kernel.unsupported(shape, CHIPS[kernel]) is None
    for seed in range(3):
        scores, protected, recency, budgets = drawn(shape, seed=seed, values=values)
        ours = assert_same(kernel.thresholds, (scores, protected, recency, budgets))
        np.testing.assert_array_equal(ours.sum(-1), np.minimum((recency >= 0).sum(-1), budgets))


@pytest.mark.parametrize("budget", [-1, 0, 1, 5, 60, 61, 1000])
def test_budgets_of_none_of_all_and_of_more(kernel, budget):
    """The smallest are less than what is protected, whose keys tie at the highest there is."""
    scores, protected, recency, budgets = drawn((4, 61), seed=budget + 1)
    ours = assert_same(kernel.thresholds, (scores, protected, recency, np.full_like(budgets, budget)))
    np.testing.assert_array_equal(ours.sum(-1), np.clip(budget, 0, (recency >= 0).sum(-1)))


def test_scores_that_are_no_numbers_zeros_of_both_signs_and_neighbours(kernel):
    numbers = np.asarray([0.0, -0.0, 1e-45, -1e-45, 3e38, -3.4028235e38, 1.0], np.float32)
    above = np.nextafter(numbers, np.float32(np.inf))
    row = np.tile(np.concatenate([numbers, above, np.asarray([np.nan, np.inf, -np.inf], np.float32)]), 2)
    count = row.size
    scores, budgets = np.tile(row, (count + 2, 1)), np.arange(count + 2, dtype=np.int32)
    for protect in (False, True):
        protected = np.tile((np.arange(count) % 7 == 2) & protect, (count + 2, 1))
        ages = np.tile(np.arange(count, dtype=np.int32)[::-1], (count + 2, 1))
        ages[:, 5] = -1
        ours = assert_same(kernel.thresholds, (scores, protected, ages, budgets))
        assert not (ours & np.isneginf(row) & ~protected).any()
        assert not ours[:, 5].any()


def test_the_highest_ages_there_are(kernel):
    recency = np.asarray([[2**31 - 2, 2**31 - 3, 0, 2**30, 2**30 - 1]] * 6, np.int32)
    zeros = np.zeros(recency.shape, np.float32)
    assert_same(kernel.thresholds, (zeros, zeros > 0, recency, np.arange(6, dtype=np.int32)))


@pytest.mark.parametrize("rows", [(3, 4, 2), (3, 3), (5,)])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (4, 1)])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(kernel, rows, mesh_shape, monkeypatch):
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(kernel, "unsupported", lambda shape, device: None)
    monkeypatch.setattr(kernel, "thresholds", functools.partial(kernel.thresholds, interpret=True))
    arrays = tuple(map(jnp.asarray, drawn((*rows, 50), values=3)))
    assert kernel.__name__.endswith(choose(arrays[0].shape, mesh=mesh).name)
    names = "scores", "protected", "recency", "budgets"
    ours = jax.jit(functools.partial(select, mesh=mesh))(**dict(zip(names, arrays, strict=True)))
    np.testing.assert_array_equal(ours, kept(*arrays))
