"""scissorhands: tokens that attention passes over go."""

import numpy as np

from tests.views import check_scores, check_slots_and_rows, expected, fitted, random_view, scores_of


def test_minus_the_share_of_queries_that_passed_a_token_over():
    selection, view = fitted("scissorhands")[0], random_view(numbers=("low",))
    wanted = expected(view, lambda tokens: -tokens.numbers["low"] / (tokens.num_seen - tokens.positions))
    check_scores(scores_of(selection, view), wanted)
    check_slots_and_rows(selection, view)
    assert selection.numbers == ("low",)


def test_the_newest_token_has_had_one_query():
    view = random_view(numbers=("low",))
    newest = view.positions == view.num_seen[:, None, None] - 1
    scores = scores_of(fitted("scissorhands")[0], view)
    np.testing.assert_allclose(scores[newest], -view.numbers["low"][newest], rtol=1e-6)
