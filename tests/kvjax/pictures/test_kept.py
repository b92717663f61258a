"""The picture of kept positions: how much of each bin of positions has come, and is kept."""

import numpy as np

from kvjax.pictures.kept import shares_of


def test_shares_of_single_positions():
    kept = np.asarray([[1, 0, 0], [1, 0, 1]], np.bool_)
    come, held = shares_of(kept, np.asarray([2, 3]), 3)
    np.testing.assert_array_equal(come, [[1, 1], [1, 1], [0, 1]])
    np.testing.assert_array_equal(held, [[1, 1], [0, 0], [0, 1]])


def test_shares_of_bins_of_unequal_width():
    """Two bins of five positions: 0 and 1, and the other three."""
    kept = np.asarray([[1, 0, 1, 1, 0]], np.bool_)
    come, held = shares_of(kept, np.asarray([4]), 2)
    np.testing.assert_allclose(come, [[1], [2 / 3]])
    np.testing.assert_allclose(held, [[1 / 2], [2 / 3]])
