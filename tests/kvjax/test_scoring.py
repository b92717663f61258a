"""Means over tokens, groups of query heads, neighbours, and the weights of the last queries."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import scoring
from tests.fitted import QUICK, normal
from tests.views import call, expected, heard_by, neighbours, observed, random_view, shape_of


def inputs(*, seed=0):
    """Numbers `B K S`, distinct positions in mixed order with empty slots, and which count."""
    random = np.random.default_rng(seed)
    positions = random.permuted(np.broadcast_to(np.arange(0, 45, 3, dtype=np.int32), (2, 3, 15)), axis=2)
    positions = np.where(random.uniform(size=positions.shape) < 0.2, np.int32(-1), positions)
    counted = (positions >= 0) & (random.uniform(size=positions.shape) < 0.8)
    return normal(2, 3, 15, seed=seed), positions, counted


def compiled(function, *arrays, **static):
    return np.asarray(jax.jit(lambda *given: function(*given, **static), compiler_options=QUICK)(*arrays))


@pytest.mark.parametrize("more", [(), (4,), (4, 2)])
def test_mean_over_slots_that_count(more):
    _, _, counted = inputs()
    counted[1, 2] = False
    numbers = normal(2, 3, 15, *more)
    found = compiled(
        scoring.mean_over, np.where(counted.reshape(2, 3, 15, *(1,) * len(more)), numbers, np.nan), counted
    )
    assert found.shape == (2, 3, *more)
    for row, head in np.ndindex(2, 3):
        wanted = numbers[row, head][counted[row, head]].mean(axis=0) if counted[row, head].any() else np.zeros(more)
        np.testing.assert_allclose(found[row, head], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", [1, 2, 3])
def test_groups_of_neighbouring_query_heads(group):
    view = random_view(shape=shape_of(query_heads=2 * group))
    numbers = normal(3, 2 * group, 40)
    by_group = numbers.reshape(3, 2, group, 40)
    np.testing.assert_allclose(scoring.group_mean(jnp.asarray(numbers), view), by_group.mean(axis=2), atol=1e-6)
    np.testing.assert_array_equal(scoring.group_max(jnp.asarray(numbers), view), by_group.max(axis=2))
    np.testing.assert_array_equal(scoring.by_group(jnp.asarray(numbers), view), by_group)


def test_in_order_of_positions():
    _, positions, counted = inputs()
    order, places = (np.asarray(array) for array in scoring.in_order(jnp.asarray(positions), jnp.asarray(counted)))
    for row, head in np.ndindex(2, 3):
        count = counted[row, head].sum()
        first = order[row, head, :count]
        assert counted[row, head, first].all()
        assert (np.diff(positions[row, head, first]) > 0).all()
        np.testing.assert_array_equal(np.sort(order[row, head]), np.arange(15))
        np.testing.assert_array_equal(order[row, head, places[row, head]], np.arange(15))


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("kernel", [1, 3, 7, 31])
def test_pooled_over_neighbours_that_count(kernel, kind):
    numbers, positions, counted = inputs()
    counted[1, 1] = False
    numbers -= 5  # a zero beyond the ends must not be the largest
    found = compiled(scoring.pooled, numbers, positions, counted, kernel=kernel, kind=kind)
    for row, head in np.ndindex(2, 3):
        slots = np.flatnonzero(counted[row, head])
        slots = slots[np.argsort(positions[row, head, slots])]
        wanted = neighbours(numbers[row, head, slots].astype(np.float64), kernel, kind)
        np.testing.assert_allclose(found[row, head, slots], wanted, rtol=1e-5)


@pytest.mark.parametrize("window", [1, 5, 8])
def test_weights_of_the_last_queries(window):
    """Each query sees tokens up to its own position, those of the window too; queries that never came give nothing."""
    view = random_view()
    found = compiled_view(view, window)
    assert found.shape == (3, 2, 40)
    heard = (view.query_positions[:, -window:] >= 0).sum(axis=1)
    assert (heard < window).tolist() == [False, window > 4, window > 6]
    np.testing.assert_allclose(found.sum(axis=2), np.broadcast_to(heard[:, None], (3, 2)), rtol=1e-5)

    wanted = expected(view, lambda tokens: heard_by(view, tokens, window)[0].mean(axis=0).sum(axis=0))
    empty = np.isnan(wanted)
    assert empty.any()
    np.testing.assert_allclose(found[~empty], wanted[~empty], atol=1e-6)
    assert (found[empty] == 0).all()


class OfView:
    """Stands for a selection: its score is any function of a view."""

    def __init__(self, function):
        self.score = function


def compiled_view(view, window):
    return call(OfView(lambda view: scoring.window_mass(view, window=window)), "score", view)


def test_large_products_do_not_overflow():
    view = random_view()
    found = compiled_view(dataclasses.replace(view, queries=1e4 * view.queries), 8)
    assert np.isfinite(found).all()
    assert found.max() > 0.99


@pytest.mark.parametrize(("window", "kind"), [(8, "avg"), (5, "max")])
def test_the_observed_window_smooths_what_is_before_it(window, kind):
    view = random_view()
    found = call(OfView(lambda view: scoring.observed_window(view, window=window, kernel=5, pool=kind)), "score", view)
    wanted = observed(view, window=window, kernel=5, kind=kind)
    held = ~np.isnan(wanted)
    np.testing.assert_allclose(found[held], wanted[held], atol=1e-6)
    first = np.min(np.where(view.query_positions >= 0, view.query_positions, 99)[:, -window:], axis=1)
    in_window = held & (view.positions >= first[:, None, None])
    assert in_window.any()
    assert (found[in_window] == 0).all()
