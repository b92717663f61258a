"""rkv: tokens that the last queries attend to, and that do not repeat others."""

import dataclasses

import numpy as np
import pytest

from kvjax.errors import UserError
from tests.fitted import normal
from tests.views import (
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    neighbours,
    random_view,
    scores_of,
    softmax,
    view_of,
)


def by_formula(view, *, kernel=7, weight=0.1, threshold=0.5):
    """The docstring's formula in float64, one head at a time."""

    def score(tokens):
        places = view.query_positions[tokens.row]
        heard = np.flatnonzero(places >= 0)
        before = tokens.positions < np.min(places[heard])
        scores = np.zeros(len(tokens.slots))
        if not before.any():
            return scores
        keys = tokens.keys[before]
        importance = np.zeros(len(keys))
        for query in heard:
            vectors = view.queries[tokens.row, query][list(tokens.query_heads)].astype(np.float64)
            importance += softmax(np.max(vectors @ keys.T, axis=0) / np.sqrt(keys.shape[1])) / len(heard)
        directions = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        cosines = directions @ directions.T
        np.fill_diagonal(cosines, 0)
        for row in cosines:
            above = np.flatnonzero(row > threshold)
            if len(above):
                row[above[-1]] = 0
        redundancy = softmax(cosines.mean(axis=0))
        scores[before] = weight * neighbours(importance, kernel, "max") - (1 - weight) * redundancy
        return scores

    return expected(view, score)


def repeating_view():
    """Keys about six directions, so that many are near repetitions."""
    view = random_view()
    centres = normal(6, 16, seed=21)
    keys = centres[np.random.default_rng(3).integers(0, 6, view.positions.shape)] + 0.4 * view.keys
    return dataclasses.replace(view, keys=keys * (view.positions >= 0)[..., None].astype(np.float32))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kernel": 1, "weight": 0.0},
        {"kernel": 3, "weight": 1.0},
        {"threshold": 0.9, "weight": 0.5},
        {"threshold": -0.4, "weight": 0.0},
    ],
)
def test_equals_the_formula(arguments):
    view, (selection, _) = repeating_view(), fitted("rkv", **arguments)
    check_scores(scores_of(selection, view), by_formula(view, **arguments))


def test_slots_and_rows():
    check_slots_and_rows(fitted("rkv")[0], repeating_view())


def test_more_tokens_than_a_block_of_rows():
    keys = normal(1, 2, 300, 16)
    queries, places = normal(1, 8, 4, 16, seed=4), np.arange(292, 300, dtype=np.int32)[None]
    view = view_of(keys, queries=queries, query_positions=places)
    check_scores(scores_of(fitted("rkv")[0], view), by_formula(view))


def test_of_repeated_tokens_the_newest_stays():
    """Four times the same key among others: all but the newest are worse than any other."""
    keys, same = normal(1, 2, 40, 16), [3, 9, 17, 28]
    keys[:, :, same] = keys[:, :, same[:1]]
    places = np.arange(32, 40, dtype=np.int32)[None]
    view = view_of(keys, queries=0.01 * normal(1, 8, 4, 16, seed=1), query_positions=places)
    scores = scores_of(fitted("rkv", weight=0.0)[0], view)[0, :, :32]
    others = np.setdiff1d(np.arange(32), same)
    assert (scores[:, same[:3]].max(axis=1) < scores[:, others].min(axis=1)).all()
    assert (scores[:, 28] > scores[:, same[0]]).all()


def test_what_it_needs():
    selection, _ = fitted("rkv", queries=16)
    assert (selection.num_queries, selection.numbers, selection.kernel) == (16, (), 7)
    assert (fitted("rkv")[0].queries, fitted("rkv")[0].weight, fitted("rkv")[0].threshold) == (8, 0.1, 0.5)
    for arguments in ({"queries": 0}, {"kernel": 2}, {"weight": 1.5}, {"threshold": 2.0}):
        with pytest.raises(UserError, match=rf"rkv\({next(iter(arguments))}\) is"):
            fitted("rkv", **arguments)
