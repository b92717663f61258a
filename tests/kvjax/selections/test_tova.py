"""tova: the last query's weights, mean over all query heads: one set of tokens for all heads."""

import dataclasses

import numpy as np
import pytest

from tests.views import (
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    golden_view,
    heard_by,
    random_view,
    row_of,
    scores_of,
    tokens_of,
)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_equals_kvpress(golden, model):
    view, arrays = golden_view(golden, model, window=1)
    check_scores(scores_of(fitted("tova")[0], view), arrays["tova"], where=view.scorable)


def by_formula(view):
    """A position's weights over all query heads; a head that does not hold it gives it none."""
    weights = [
        {
            (head, int(place)): heard_by(view, tokens, 1)[0][:, 0].mean(axis=0)[index]
            for head in range(view.shape.num_kv_heads)
            for tokens in [tokens_of(view, row, head)]
            for index, place in enumerate(tokens.positions)
        }
        for row in range(view.positions.shape[0])
    ]

    def score(tokens):
        heads = range(view.shape.num_kv_heads)
        return [
            np.mean([weights[tokens.row].get((head, int(place)), 0.0) for head in heads]) for place in tokens.positions
        ]

    return expected(view, score)


def same_slots():
    """Heads hold the same tokens in the same slots, as they do where one set is kept for all."""
    view, random = random_view(queries=1), np.random.default_rng(0)
    first = {name: np.repeat(getattr(view, name)[:, :1], 2, axis=1) for name in ("positions", "scorable")}
    keys = np.where(first["positions"][..., None] >= 0, random.normal(size=view.keys.shape), 0)
    return dataclasses.replace(view, keys=keys.astype(np.float32), **first)


def test_mean_over_all_query_heads():
    view = same_slots()
    scores = scores_of(fitted("tova")[0], view)
    check_scores(scores, by_formula(view))
    np.testing.assert_array_equal(scores[:, 0], scores[:, 1])


def test_slots_and_rows_where_heads_agree_on_slots():
    view, selection = same_slots(), fitted("tova")[0]
    scores, order = scores_of(selection, view), np.random.default_rng(1).permutation(view.positions.shape[2])
    changed = {name: getattr(view, name)[:, :, order] for name in ("keys", "values", "positions", "scorable")}
    found = scores_of(selection, dataclasses.replace(view, **changed))
    np.testing.assert_allclose(found, scores[:, :, order], rtol=0, atol=1e-6)
    for row in range(3):
        np.testing.assert_allclose(scores_of(selection, row_of(view, row)), scores[row : row + 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", ["slots", "tokens"])
def test_heads_that_hold_tokens_in_slots_of_their_own(changes):
    """A token's weights are added up by its position, wherever heads hold it (outliers, criticalkv(base=tova))."""
    view, selection = same_slots() if changes == "slots" else random_view(queries=1), fitted("tova")[0]
    if changes == "tokens":
        check_scores(scores_of(selection, view), by_formula(view))
    check_slots_and_rows(selection, view)


def test_it_needs_the_last_query():
    assert fitted("tova")[0].num_queries == 1
