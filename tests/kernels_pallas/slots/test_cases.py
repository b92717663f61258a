"""What is measured."""

import jax
import pytest

from kernels_pallas.slots.cases import CASES
from tests.kernels_pallas.aot import one_device


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_the_shapes_that_it_says(case):
    function, (plane, fields, slots) = case.build(one_device())
    done = jax.eval_shape(function, plane, fields, slots)
    assert (done.shape, done.dtype) == (plane.shape, plane.dtype)
    assert plane.shape[2] == case.slots * case.width // 8
    assert case.name.split(".")[0] == "slots"
    assert case.loop_trips("TPU v6 lite") == ((1 if case.slots == 896 else min(2 * case.width, 8),),)
    assert case.step_bytes("TPU v6 lite") == 2 * min(plane.shape[2], 1024) * 128 + 128 * 256
