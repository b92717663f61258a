"""The named shapes: what a step of each reads and writes, and that the kernel serves them."""

import jax
import pytest

from kernels_pallas.score.cases import CASES
from tests.kernels_pallas.aot import one_device

BY_NAME = {case.name: case for case in CASES}


def test_names_are_distinct_and_say_kind_group_and_rotation():
    assert len(BY_NAME) == len(CASES)
    assert {"score.int4.g8.rotated", "score.int4table.g4.rotated", "score.bf16.g4"} <= BY_NAME.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("score.bf16.g8", 1024 * 8 * (256 + 4 + 32)),
        ("score.int4table.g4.rotated", 2048 * 8 * (64 + 2 + 4 + 16)),
        ("score.int4.g8.rotated", 2048 * 8 * (64 + 2 + 4 + 32)),
    ],
)
def test_a_step_moves_keys_scales_positions_and_scores(name, expected):
    assert BY_NAME[name].step_bytes("TPU v6 lite") == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_serves_them(case):
    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert case.runs_on(device)
    assert case.loop_trips("TPU7x") == (() if case.bits == 16 else ((4,),))
    function, arguments = case.build(one_device())
    assert [array.shape for array in arguments[1:]] == [(8, 8 * case.group, 128), (1, 8 * case.group, 64)]
    assert jax.tree.leaves(arguments[0])[0].shape[:2] == (8, 8)
    assert callable(function)
