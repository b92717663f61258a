"""lagkv: each token's rank in its chunk, by how far it stands out against the next chunk."""

import dataclasses

import numpy as np
import pytest

from kvjax.errors import UserError
from tests.views import check_slots_and_rows, expected, fitted, golden_view, random_view, scores_of, softmax


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_ranks_are_those_of_kvpress(golden, model):
    """kvpress counts ranks from 0: there the best of a chunk is below what has no next chunk, here it is level."""
    view, arrays = golden_view(golden, model, sinks=4)
    ranks = 16 * scores_of(fitted("lagkv", lag=16)[0], view)
    np.testing.assert_array_equal(ranks[:, :, 4:68] - 1, 16 * arrays["lagkv"][:, :, 4:68])
    assert (ranks[:, :, 68:] == 16).all()
    assert (arrays["lagkv"][:, :, 68:] == 1).all()


def by_formula(view, lag):
    def score(tokens):
        scores = np.ones(len(tokens.slots))
        if not tokens.scorable.any():
            return scores
        first = int(np.flatnonzero(tokens.scorable)[0])
        for start in range(first, len(tokens.slots) - 2 * lag + 1, lag):
            own, following = slice(start, start + lag), slice(start + lag, start + 2 * lag)
            total = np.zeros(lag)
            for numbers in (tokens.keys, tokens.values):
                low, high = numbers[following].min(axis=0), numbers[following].max(axis=0)
                total += softmax(np.std((numbers[own] - low) / (high - low), axis=1, ddof=1))
            scores[own] = (1 + np.argsort(np.argsort(total))) / lag
        return scores

    return expected(view, score)


@pytest.mark.parametrize("lag", [2, 5, 8, 64])
def test_equals_the_formula(lag):
    """Chunks are of tokens held, in the order of positions, from the first one that may go."""
    view, (selection, _) = random_view(), fitted("lagkv", lag=lag)
    wanted = by_formula(view, lag)
    held = ~np.isnan(wanted)
    np.testing.assert_allclose(scores_of(selection, view)[held], wanted[held], rtol=1e-6)
    assert (lag > 8) == (wanted[held] == 1).all()
    check_slots_and_rows(selection, view, tolerance=1e-6)


def test_a_channel_that_does_not_change_divides_by_nothing():
    view = random_view()
    held = (view.positions >= 0)[..., None]
    keys = np.where(held & (np.arange(16) == 3), np.float32(2), view.keys)
    scores = scores_of(fitted("lagkv", lag=8)[0], dataclasses.replace(view, keys=keys))
    assert ((scores > 0) & (scores <= 1)).all()
    assert len(np.unique(scores)) == 8


@pytest.mark.parametrize("lag", [1, 0])
def test_chunks_of_one_token(lag):
    with pytest.raises(UserError, match=rf"lagkv\(lag\) is {lag}; it must be at least 2"):
        fitted("lagkv", lag=lag)
