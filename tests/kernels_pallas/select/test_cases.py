"""What is measured."""

import jax
import pytest

from kernels_pallas.select.cases import CASES
from tests.kernels_pallas.aot import one_device


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_the_shapes_that_it_says(case):
    function, (keys, ages, wanted) = case.build(one_device())
    assert keys.shape == ages.shape == (case.rows, case.slots)
    best, newest = jax.eval_shape(function, keys, ages, wanted)
    assert best.shape == newest.shape == (case.rows, 1)
    assert case.name.split(".")[0] == "select"
    assert 0 < case.step_bytes("TPU v6 lite") <= case.rows * case.slots * 8
    assert case.step_bytes("TPU v6 lite") == {2176: 64, 16_384: 16, 131_072: 8}[case.slots] * case.slots * 8
