"""The kernel in interpret mode keeps the same slots as the reference, bit for bit, and says what it does not serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.select import mosaic_tpu, reference, select
from kernels_pallas.select.api import choose
from kernels_pallas.select.cases import CASES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"


@functools.partial(jax.jit, static_argnames=("interpret", "kernel"))
def kept(scores, protected, recency, budgets, *, kernel, interpret=True):
    search = functools.partial(mosaic_tpu.thresholds, interpret=interpret) if kernel else reference.thresholds
    return reference.select(scores, protected=protected, recency=recency, budgets=budgets, search=search)


def drawn(shape, *, seed=0, values=None):
    """Scores (of few values if asked for), protected slots, distinct ages with a tenth of the slots empty, budgets."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape)
    if values:
        scores = np.round(scores * values) / values
    recency = np.argsort(generator.random(shape), axis=-1)
    recency[generator.random(shape) < 0.1] = -1
    protected = generator.random(shape) < 0.1
    budgets = generator.integers(0, shape[-1] + 2, shape[:-1])
    return scores.astype(np.float32), protected, recency.astype(np.int32), budgets.astype(np.int32)


def assert_same(arrays, **how):
    arrays = tuple(map(jnp.asarray, arrays))
    ours, theirs = (np.asarray(kept(*arrays, kernel=kernel, **how if kernel else {})) for kernel in (True, False))
    np.testing.assert_array_equal(ours, theirs)
    return ours


@pytest.mark.parametrize("shape", [(1,), (61,), (3, 128), (2, 3, 257), (9, 130), (72, 40)])
@pytest.mark.parametrize("values", [None, 2])
def test_equals_the_reference(shape, values):
    """Rows and slots that fill no tile, several steps, and scores that tie."""
    assert mosaic_tpu.unsupported(shape, CHIP) is None
    for seed in range(3):
        scores, protected, recency, budgets = drawn(shape, seed=seed, values=values)
        ours = assert_same((scores, protected, recency, budgets))
        np.testing.assert_array_equal(ours.sum(-1), np.minimum((recency >= 0).sum(-1), budgets))


@pytest.mark.parametrize("budget", [-1, 0, 1, 5, 60, 61, 1000])
def test_budgets_of_none_of_all_and_of_more(budget):
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
        ours = assert_same((np.tile(row, (count + 2, 1)), protected, ages, np.arange(count + 2, dtype=np.int32)))
        assert not (ours & np.isneginf(row) & ~protected).any()
        assert not ours[:, 5].any()


def test_constant_rows_beside_rows_without_ties_and_rows_with_nothing():
    """The second search runs for all rows of a step where one has ties; the others come out as before."""
    scores, protected, recency, budgets = drawn((16, 70), seed=4)
    scores[3], scores[4], recency[5], scores[6] = 0.5, -np.inf, -1, -0.0
    protected[3:7] = False
    budgets[:] = 20
    ours = assert_same((scores, protected, recency, budgets))
    assert not ours[4:6].any()
    newest = np.sort(recency[3])[-20]
    np.testing.assert_array_equal(ours[3], recency[3] >= newest)


def test_the_highest_ages_there_are():
    recency = np.asarray([[2**31 - 2, 2**31 - 3, 0, 2**30, 2**30 - 1]], np.int32)
    for budget in range(6):
        zeros = np.zeros((1, 5), np.float32)
        assert_same((zeros, zeros > 0, recency, np.asarray([budget], np.int32)))


def test_rows_too_long_to_be_written_out_go_through_a_loop(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_STEP_KEYS", 8 * 256)
    monkeypatch.setattr(mosaic_tpu, "_PIECE_SLOTS", 128)
    arrays = tuple(map(jnp.asarray, drawn((9, 300), values=3)))
    kernel = functools.partial(mosaic_tpu.thresholds, interpret=True)
    ours = reference.select(arrays[0], protected=arrays[1], recency=arrays[2], budgets=arrays[3], search=kernel)
    np.testing.assert_array_equal(ours, kept(*arrays, kernel=False))


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        assert_same(drawn((10, 130), values=3), interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("rows", [(3, 4, 2), (3, 3), (5,)])
@pytest.mark.parametrize("mesh_shape", [(2, 2), (4, 1)])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(rows, mesh_shape, monkeypatch):
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda shape, device: None)
    monkeypatch.setattr(mosaic_tpu, "thresholds", functools.partial(mosaic_tpu.thresholds, interpret=True))
    scores, protected, recency, budgets = map(jnp.asarray, drawn((*rows, 50), values=3))
    assert choose(scores.shape, mesh=mesh).name == "mosaic_tpu"
    ours = jax.jit(functools.partial(select, mesh=mesh))(scores, protected=protected, recency=recency, budgets=budgets)
    np.testing.assert_array_equal(ours, kept(scores, protected, recency, budgets, kernel=False))


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
