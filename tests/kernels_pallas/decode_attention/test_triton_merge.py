"""Splits put together, against the same in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import triton_merge
from tests.cuda import needs_cuda
from tests.kernels_pallas.decode_attention.gpu_cases import resources_of


def expected(output, maximum, total):
    output, maximum, total = (np.asarray(array, np.float64) for array in (output, maximum, total))
    largest = maximum.max(axis=1)
    decay = np.exp2(maximum - largest[:, None])
    return np.einsum("hsrq,hsq->hqr", output, decay), largest, (total * decay).sum(axis=1)


@pytest.mark.parametrize(("splits", "width", "rows"), [(2, 64, 8), (132, 16, 16), (1056, 16, 8)])
def test_equals_a_sum_over_splits(splits, width, rows):
    generator = np.random.default_rng(splits)
    maximum = generator.normal(size=(2, splits, rows)) * 20
    maximum[:, -1] = -1e15  # a split that saw nothing
    maximum[1, :, 0] = -1e15  # nor did any of a row's
    arrays = generator.normal(size=(2, splits, width, rows)), maximum, generator.uniform(size=(2, splits, rows))
    arrays = [jnp.asarray(array, jnp.float32) for array in arrays]
    found = jax.jit(lambda *arrays: triton_merge.merge(*arrays, interpret=True))(*arrays)
    sums_of_sizes = expected(jnp.abs(arrays[0]), *arrays[1:])  # what float32 rounds by: sums may be small beside them
    for ours, theirs, sizes in zip(found, expected(*arrays), sums_of_sizes, strict=True):
        np.testing.assert_array_less(np.abs(ours - theirs), 1e-6 * np.abs(sizes) + 1e-12)


@needs_cuda
@pytest.mark.parametrize("name", ["int4", "int4.t16"])
def test_an_h200_takes_it_and_spills_nothing(name, tmp_path, record_property):
    registers, spilled = resources_of("merge_attention", name, tmp_path, record_property)
    assert registers <= 255
    assert spilled == 0
