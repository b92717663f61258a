"""snapkv: what the last queries attend to, smoothed over neighbours."""

import pytest

from kvjax.errors import UserError
from tests.views import check_scores, check_slots_and_rows, fitted, golden_view, observed, random_view, scores_of


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_equals_kvpress(golden, model):
    view, arrays = golden_view(golden, model, window=16)
    selection, _ = fitted("snapkv", queries=16, kernel=5)
    check_scores(scores_of(selection, view), arrays["snapkv"], where=view.scorable)


@pytest.mark.parametrize(("queries", "kernel", "pool"), [(8, 5, "avg"), (8, 7, "max"), (3, 1, "avg")])
def test_equals_the_formula(queries, kernel, pool):
    """Also in a row that has had fewer queries than the window has, and one that is all window."""
    view, (selection, _) = random_view(), fitted("snapkv", queries=queries, kernel=kernel, pool=pool)
    scores = scores_of(selection, view)
    check_scores(scores, observed(view, window=queries, kernel=kernel, kind=pool))
    assert (scores >= 0).all()
    check_slots_and_rows(selection, view)


def test_what_it_needs():
    selection, arrays = fitted("snapkv")
    assert (selection.queries, selection.num_queries, selection.kernel, selection.pool) == (64, 64, 5, "avg")
    assert (selection.heads, selection.schedule) == ("uniform", "uniform")
    assert (selection.numbers, selection.wants_moments, selection.shares, arrays) == ((), False, "none", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": 0}, r"snapkv\(queries\) is 0; it must be at least 1 and at most 1024\."),
        ({"kernel": 4}, r"snapkv\(kernel\) is 4; it must be one of 1, 3, 5, .*The nearest is 3\."),
        ({"pool": "mean"}, r"snapkv\(pool\) is mean; it must be one of avg, max\."),
    ],
)
def test_others_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        fitted("snapkv", **arguments)
