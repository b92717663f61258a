"""kvzip: the largest weight that a token got when the prompt was read again."""

import numpy as np
import pytest

from kvjax.errors import UserError
from tests.views import check_slots_and_rows, fitted, random_view, scores_of


def test_the_largest_weight():
    selection, view = fitted("kvzip")[0], random_view(numbers=("peak",))
    np.testing.assert_array_equal(scores_of(selection, view), view.numbers["peak"])
    check_slots_and_rows(selection, view, tolerance=0)


def test_the_prompt_is_read_again_before_it_is_compressed():
    selection = fitted("kvzip", chunk=512)[0]
    assert (selection.numbers, selection.replay, selection.waits, selection.shares) == (("peak",), 512, True, "none")
    assert fitted("kvzip")[0].replay == 2048
    with pytest.raises(UserError, match=r"kvzip\(chunk\) is 0; it must be at least 1"):
        fitted("kvzip", chunk=0)
