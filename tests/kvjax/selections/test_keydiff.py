"""keydiff: keys that point away from the mean direction stay."""

import dataclasses

import numpy as np
import pytest

from tests.views import check_scores, check_slots_and_rows, expected, fitted, golden_view, random_view, scores_of


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_equals_kvpress(golden, model):
    view, arrays = golden_view(golden, model)
    check_scores(scores_of(fitted("keydiff")[0], view), arrays["keydiff"])


def score(tokens):
    directions = tokens.keys / np.linalg.norm(tokens.keys, axis=1, keepdims=True)
    anchor = directions.mean(axis=0)
    return -directions @ anchor / np.linalg.norm(anchor)


def test_equals_the_formula():
    """The mean direction is over all tokens held, protected ones too."""
    view = random_view()
    check_scores(scores_of(fitted("keydiff")[0], view), expected(view, score))
    check_slots_and_rows(fitted("keydiff")[0], view)


def test_keys_of_no_length():
    """A key of zeros has no direction: it scores 0, and takes part in the mean as it does in kvpress."""
    view = random_view()
    zeros = np.zeros_like(view.keys)
    scores = scores_of(fitted("keydiff")[0], dataclasses.replace(view, keys=zeros))
    np.testing.assert_array_equal(scores, np.zeros(view.positions.shape))
