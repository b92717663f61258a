"""h2o: the attention mass so far; with mean=1, kvpress' ObservedAttention."""

import numpy as np
import pytest

from kvjax.errors import UserError
from tests.views import (
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    golden_view,
    random_view,
    scores_of,
    softmax,
)


def masses_of(arrays):
    """Sums of the causal weights of all queries, mean over the group, `B K S` float64."""
    queries, keys = (arrays[name].astype(np.float64) for name in ("queries", "keys"))
    group, count = queries.shape[1] // keys.shape[1], keys.shape[2]
    logits = queries @ np.repeat(keys, group, axis=1).swapaxes(2, 3) / np.sqrt(keys.shape[3])
    weights = softmax(np.where(np.tri(count, dtype=bool), logits, -np.inf))
    return weights.sum(axis=2).reshape(keys.shape[0], keys.shape[1], group, count).mean(axis=2)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_the_mean_is_kvpress_observed_attention(golden, model):
    _, arrays = golden_view(golden, model)
    view, _ = golden_view(golden, model, numbers={"sum": masses_of(arrays).astype(np.float32)})
    check_scores(scores_of(fitted("h2o", mean=1)[0], view), arrays["observed"])


@pytest.mark.parametrize("mean", [0, 1])
def test_sum_and_mean_of_all_queries(mean):
    view = random_view(numbers=("sum",))

    def score(tokens):
        return tokens.numbers["sum"] / ((tokens.num_seen - tokens.positions) if mean else 1)

    check_scores(scores_of(fitted("h2o", mean=mean)[0], view), expected(view, score))
    check_slots_and_rows(fitted("h2o", mean=mean)[0], view)


def test_what_it_needs():
    selection = fitted("h2o")[0]
    assert selection.numbers == ("sum",)
    assert (selection.num_queries, selection.wants_moments, selection.waits) == (0, False, False)
    with pytest.raises(UserError, match=r"h2o\(mean\) is 2; it must be one of 0, 1\."):
        fitted("h2o", mean=2)
