"""The choice of slots against a sort: protected first, then by score, then the newest."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select import select
from kernels_pallas.select.reference import ordered

LOWEST = np.finfo(np.float32).min


@jax.jit
def chosen(scores, protected, recency, budgets):
    return select(scores, protected=protected, recency=recency, budgets=budgets)


def by_sorting(scores, protected, recency, budgets):
    """The rule, a row at a time, by NumPy's lexsort."""
    kept = np.zeros(scores.shape, bool)
    for row in np.ndindex(scores.shape[:-1]):
        numbers = np.where(np.isnan(scores[row]), LOWEST, scores[row].astype(np.float64))
        numbers = np.where(protected[row], np.inf, numbers)
        candidate = (recency[row] >= 0) & (numbers > -np.inf)
        order = np.lexsort((-recency[row].astype(np.int64), -numbers, ~protected[row], ~candidate))
        kept[row][order[: max(min(budgets[row], candidate.sum()), 0)]] = True
    return kept


def check(scores, *, protected=None, recency=None, budgets):
    """Asserts that both agree for a batch of rows, and gives what was kept."""
    scores = np.asarray(scores)
    scores = scores.astype(np.float32) if scores.dtype == np.float64 else scores
    protected = np.zeros(scores.shape, bool) if protected is None else np.asarray(protected)
    if recency is None:
        recency = np.broadcast_to(np.arange(scores.shape[-1]), scores.shape)
    recency = np.asarray(recency, np.int32)
    budgets = np.broadcast_to(np.asarray(budgets, np.int32), scores.shape[:-1])
    kept = np.asarray(chosen(*map(jnp.asarray, (scores, protected, recency, budgets))))
    expected = by_sorting(np.asarray(scores, np.float32), protected, recency, budgets)
    np.testing.assert_array_equal(kept, expected)
    return kept


def drawn(seed, shape=(3, 2, 61)):
    """Scores, protected slots, and distinct ages in any order, a tenth of the slots empty."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape).astype(np.float32)
    recency = np.argsort(generator.random(shape), axis=-1)
    recency[generator.random(shape) < 0.1] = -1
    return scores, generator.random(shape) < 0.15, recency


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 30, 60, 61, 62, 1000])
def test_random_scores(budget):
    scores, protected, recency = drawn(budget)
    kept = check(scores, protected=protected, recency=recency, budgets=budget)
    np.testing.assert_array_equal(kept.sum(-1), np.minimum((recency >= 0).sum(-1), budget))


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("budget", [1, 13, 40])
def test_the_newest_of_equal_scores(budget, values):
    """Few values or one alone, so that the budget ends in the midst of a tie in every row."""
    _, protected, recency = drawn(budget)
    scores = np.random.default_rng(values).integers(-values, values, recency.shape).astype(np.float32) / 3
    check(scores, protected=protected, recency=recency, budgets=budget)
    constant = check(np.full(recency.shape, -0.25), recency=recency, budgets=budget)
    newest = np.sort(np.where(recency >= 0, recency, -1), axis=-1)[..., -budget]
    np.testing.assert_array_equal(constant, recency >= np.maximum(newest, 0)[..., None])


def test_rows_with_and_without_ties_and_a_budget_each():
    scores, protected, recency = drawn(5, (4, 3, 40))
    scores[1:3] = np.round(scores[1:3])
    budgets = np.arange(12).reshape(4, 3) * 4 - 1
    check(scores, protected=protected, recency=recency, budgets=budgets)


def test_negative_zero_equals_zero():
    """The newer is kept, whichever it is; the compiler must not undo it."""
    kept = check([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0]], budgets=2)
    np.testing.assert_array_equal(kept, [[False, False, True, True]] * 2)
    assert len(set(np.asarray(jax.jit(ordered)(jnp.asarray([0.0, -0.0]))).tolist())) == 1


def test_infinities_and_nan():
    """+inf is a score like others; -inf is never kept unless protected; NaN counts as the lowest finite score."""
    row = [np.nan, np.inf, -np.inf, LOWEST, -3e38, 3e38, -np.inf, np.inf, np.nan, 0.0]
    for budget in range(12):
        kept = check([row], budgets=budget)
        assert not kept[0, [2, 6]].any()
        kept = check([row], protected=[[index == 2 for index in range(10)]], budgets=budget)
        assert kept[0, 2] == (budget > 0)
        assert not kept[0, 6]
    np.testing.assert_array_equal(check([[np.nan, LOWEST, np.nan, -1.0]], budgets=2), [[False, False, True, True]])
    assert not check(np.full((2, 9), -np.inf), budgets=9).any()


def test_empty_slots_are_never_kept():
    """Neither for a score nor for being protected, whatever the budget."""
    recency = [[3, -1, 5, -7, 0]]
    kept = check(
        [[1.0, np.inf, -1.0, 9.0, 0.0]], protected=[[False, True, False, True, False]], recency=recency, budgets=9
    )
    np.testing.assert_array_equal(kept, [[True, False, True, False, True]])
    assert not check([[1.0, 2.0]], recency=[[-1, -2]], budgets=2).any()


def test_more_are_protected_than_the_budget_allows():
    """The newest of them stay, whatever their scores, and nothing else."""
    scores, _, recency = drawn(8, (2, 50))
    protected = np.random.default_rng(9).random((2, 50)) < 0.6
    kept = check(scores, protected=protected, recency=recency, budgets=11)
    assert not (kept & ~protected).any()
    np.testing.assert_array_equal(kept.sum(-1), [11, 11])


def test_huge_scores_do_not_push_protected_slots_out():
    scores = np.asarray([[3e38, np.inf, 3.4028235e38, -3e38, -np.inf, np.nan]])
    kept = check(scores, protected=[[False, False, False, True, True, True]], budgets=4)
    np.testing.assert_array_equal(kept, [[False, True, False, True, True, True]])


def test_neighbouring_floats_are_told_apart():
    """Scores one unit in the last place apart, of either sign, and the smallest numbers there are."""
    start = np.asarray([1.0, -1.0, 3e38, -3e38, 2e-38], np.float32)
    row = np.stack([start, np.nextafter(start, np.float32(np.inf)), np.nextafter(start, np.float32(-np.inf))])
    row = np.concatenate([row.ravel(), np.asarray([1e-45, -1e-45, 0.0, 1e-40], np.float32)])[None]
    for budget in range(row.size + 1):
        check(row, recency=np.arange(row.size)[None, ::-1], budgets=budget)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scores_of_few_bits(dtype):
    """Rounding makes ties of what differed."""
    scores, protected, recency = drawn(3)
    coarse = np.asarray(jnp.asarray(scores * 0.01 + 1.0).astype(dtype).astype(jnp.float32))
    assert len(np.unique(coarse)) < coarse.size / 4
    ours = chosen(*map(jnp.asarray, (coarse, protected, recency, np.full((3, 2), 20)))).tolist()
    lower = chosen(jnp.asarray(coarse).astype(dtype), *map(jnp.asarray, (protected, recency, np.full((3, 2), 20))))
    assert lower.tolist() == ours
    check(coarse, protected=protected, recency=recency, budgets=20)


def test_one_compilation_serves_every_budget():
    function = jax.jit(functools.partial(select, implementation=None))
    scores, protected, recency = map(jnp.asarray, drawn(1))
    counts = []
    for budget in (0, 1, 17, 500):
        kept = function(scores, protected=protected, recency=recency, budgets=jnp.full((3, 2), budget))
        counts.append(int(kept.sum()))
    assert function._cache_size() == 1
    assert counts == [0, 6, 102, int((recency >= 0).sum())]


def test_a_row_alone_and_a_row_of_one_slot():
    assert chosen(jnp.asarray([1.0, 3.0, 2.0]), jnp.zeros(3, bool), jnp.arange(3), jnp.int32(2)).tolist() == [0, 1, 1]
    assert chosen(jnp.asarray([[1.0]]), jnp.zeros((1, 1), bool), jnp.asarray([[4]]), jnp.asarray([1])).tolist() == [[1]]
