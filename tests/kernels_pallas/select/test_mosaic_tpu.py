"""Beside what `test_kernels.py` asks of all kernels: its steps and pieces, and what the compiler for TPUs takes."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.select import mosaic_tpu, reference
from kernels_pallas.select.cases import CASES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.kernels_pallas.select.drawn import assert_same, drawn, kept
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"


def test_constant_rows_beside_rows_without_ties_and_rows_with_nothing():
    """The second search runs for all rows of a step where one has ties; the others come out as before."""
    scores, protected, recency, budgets = drawn((16, 70), seed=4)
    scores[3], scores[4], recency[5], scores[6] = 0.5, -np.inf, -1, -0.0
    protected[3:7] = False
    budgets[:] = 20
    ours = assert_same(mosaic_tpu.thresholds, (scores, protected, recency, budgets))
    assert not ours[4:6].any()
    newest = np.sort(recency[3])[-20]
    np.testing.assert_array_equal(ours[3], recency[3] >= newest)


def test_rows_too_long_to_be_written_out_go_through_a_loop(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_STEP_KEYS", 8 * 256)
    monkeypatch.setattr(mosaic_tpu, "_PIECE_SLOTS", 128)
    arrays = tuple(map(jnp.asarray, drawn((9, 300), values=3)))
    kernel = functools.partial(mosaic_tpu.thresholds, interpret=True)
    ours = reference.select(arrays[0], protected=arrays[1], recency=arrays[2], budgets=arrays[3], search=kernel)
    np.testing.assert_array_equal(ours, kept(*arrays))


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        assert_same(mosaic_tpu.thresholds, drawn((10, 130), values=3), interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize(
    ("rows", "slots", "expected"),
    [(8, 100, 8), (24, 128, 16), (256, 2176, 64), (256, 16_384, 16), (64, 131_072, 8), (8, 200_000, 8)],
)
def test_a_step_has_as_many_rows_as_fit(rows, slots, expected):
    assert mosaic_tpu.rows_for(rows, slots) == expected


def test_what_is_not_served_says_why():
    assert mosaic_tpu.unsupported((8, 1 << 18), CHIP) is None
    assert "262145 slots a row are more than" in mosaic_tpu.unsupported((8, (1 << 18) + 1), CHIP)
    assert mosaic_tpu.unsupported((8, 64), "NVIDIA H200") == "it runs on TPUs, and this is NVIDIA H200"


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for(topology):
    assert compile_cases("kernels_pallas.select.cases", topology) == [case.name for case in CASES]
