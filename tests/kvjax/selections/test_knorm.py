"""knorm: small keys stay."""

import numpy as np
import pytest

from tests.views import check_scores, check_slots_and_rows, expected, fitted, golden_view, random_view, scores_of


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_equals_kvpress(golden, model):
    view, arrays = golden_view(golden, model)
    check_scores(scores_of(fitted("knorm")[0], view), arrays["knorm"])


def test_equals_the_formula():
    view = random_view()
    wanted = expected(view, lambda tokens: -np.sqrt(np.sum(tokens.keys**2, axis=1)))
    check_scores(scores_of(fitted("knorm")[0], view), wanted)
    check_slots_and_rows(fitted("knorm")[0], view)
