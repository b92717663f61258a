"""What is measured."""

import jax
import pytest

from kernels_pallas.encode.cases import CASES, RULES
from tests.kernels_pallas.aot import one_device


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_the_shapes_that_it_says(case):
    function, shapes = case.build(one_device())
    coded = jax.eval_shape(function, *shapes)
    assert coded.num_slots == case.slots == shapes[0].shape[2]
    assert coded.bits == RULES[case.rule].bits
    assert case.name.split(".")[0] == "encode"
    assert (len(shapes) == 2) is case.transformed
    assert case.loop_trips("TPU v6 lite")[0][0] >= 1
    assert case.step_bytes("TPU v6 lite") > 0


def test_a_step_reads_numbers_and_writes_codes_and_scales():
    case = next(case for case in CASES if case.name == "encode.int8.s8192")
    assert case.step_bytes("TPU v6 lite") == 2048 * (128 * 5 + 4)
    assert case.loop_trips("TPU v6 lite") == ((8,),)
