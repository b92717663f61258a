"""streaming: the newest tokens."""

import numpy as np

from tests.views import check_slots_and_rows, expected, fitted, random_view, scores_of, view_of


def test_newer_is_higher():
    view = random_view()
    wanted = expected(view, lambda tokens: tokens.positions)
    held = ~np.isnan(wanted)
    np.testing.assert_array_equal(scores_of(fitted("streaming")[0], view)[held], wanted[held])


def test_neighbours_differ_at_a_million_tokens():
    positions = np.arange(1_000_000, 1_000_064, dtype=np.int32)[None, None]
    scores = scores_of(fitted("streaming")[0], view_of(np.zeros((1, 1, 64, 2), np.float32), positions=positions))
    assert (np.diff(scores[0, 0]) > 0).all()


def test_slots_and_rows():
    check_slots_and_rows(fitted("streaming")[0], random_view(), tolerance=0)
