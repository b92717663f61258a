"""criticalkv: half of the budget by another selection's score, the rest weighted by output norms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.select.api import select
from kvjax.errors import UserError
from kvjax.evidence import strength
from kvjax.selection import SELECTIONS, Selection
from kvjax.selections.criticalkv import CriticalKV
from tests.views import (
    call,
    check_scores,
    check_slots_and_rows,
    expected,
    fitted,
    golden_view,
    observed,
    random_view,
    scores_of,
)

LARGEST = np.finfo(np.float32).max


def strengths(arrays):
    """`B K S`, as they are taken when tokens come."""
    made = jax.jit(strength)(np.swapaxes(arrays["values"], 1, 2), arrays["output"])
    return np.swapaxes(np.asarray(made), 1, 2)


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_strengths_are_kvpress_value_norms(golden, model):
    _, arrays = golden_view(golden, model)
    check_scores(strengths(arrays), arrays["value_norms"])


@pytest.mark.parametrize("model", ["llama", "qwen3"])
@pytest.mark.parametrize(("base", "window", "kept"), [("knorm", 0, 48), ("snapkv", 16, 16)])
def test_both_stages_and_what_is_kept_are_those_of_kvpress(golden, model, base, window, kept):
    """kvpress' first stage, 24 of 48 tokens, has SnapKV's window of 16 in it: 8 tokens of the others are left."""
    _, arrays = golden_view(golden, model)
    view, _ = golden_view(golden, model, window=window, numbers={"strength": strengths(arrays)})
    view = dataclasses.replace(view, quotas=np.full(view.positions.shape[:2], kept, np.int32))
    inner = SELECTIONS.get(base)(**({"queries": window} if window else {}))
    selection = CriticalKV(base=base, inner=inner)
    scores, theirs = scores_of(selection, view), arrays[f"critical_{base}"]
    favoured = call(selection, "favoured", view, scores)
    first = (theirs == LARGEST) & view.scorable
    np.testing.assert_array_equal(favoured, first)
    check_scores(scores, theirs, where=view.scorable & ~first)
    ours = select(
        jnp.asarray(scores),
        protected=jnp.asarray(favoured),
        recency=jnp.where(view.scorable, view.positions, -1),
        budgets=jnp.asarray(view.quotas),
    )
    among = np.where(view.scorable, theirs, -np.inf)
    best = np.argsort(-among, axis=2, kind="stable")[:, :, :kept]
    np.testing.assert_array_equal(np.flatnonzero(ours), np.flatnonzero(_mask(best, among.shape)))


def _mask(index, shape):
    mask = np.zeros(shape, bool)
    np.put_along_axis(mask, index, True, axis=2)
    return mask


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_the_first_stage_takes_its_share_of_the_best(ratio):
    """Among tokens that may go, by the base's score alone; a row without such tokens has no first stage."""
    view, (selection, _) = random_view(numbers=("strength",)), fitted("criticalkv", base="knorm", ratio=ratio)
    view = dataclasses.replace(view, quotas=np.full((3, 2), 10, np.int32))

    def best(tokens):
        order = np.argsort(np.where(tokens.scorable, np.linalg.norm(tokens.keys, axis=1), np.inf))
        chosen = np.zeros(len(tokens.slots))
        chosen[order[: min(int(10 * ratio), tokens.scorable.sum())]] = 1
        return chosen

    favoured = call(selection, "favoured", view, scores_of(selection, view))
    wanted = expected(view, best)
    held = ~np.isnan(wanted)
    np.testing.assert_array_equal(favoured[held], wanted[held] == 1)
    assert not favoured[~held].any()


def test_the_second_stage():
    view, (selection, _) = random_view(numbers=("strength",)), fitted("criticalkv", epsilon=0.01)
    wanted = (observed(view, window=64, kernel=5, kind="avg") + 0.01) * view.numbers["strength"]
    check_scores(scores_of(selection, view), np.where(view.positions >= 0, wanted, np.nan))
    check_slots_and_rows(selection, view)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddOnly(Selection):
    """Drops tokens at even positions."""

    def score(self, view):
        return jnp.where(view.positions % 2 == 1, 1.0, -jnp.inf)


def test_what_the_base_drops_stays_dropped():
    view, selection = random_view(numbers=("strength",)), CriticalKV(inner=OddOnly())
    scores = scores_of(selection, view)
    favoured = call(selection, "favoured", view, scores)
    even = (view.positions >= 0) & (view.positions % 2 == 0)
    assert (scores[even] == -np.inf).all()
    assert not favoured[even].any()
    assert favoured.any()


def test_it_asks_for_what_the_base_asks_for():
    made = {name: fitted("criticalkv", base=name)[0] for name in ("snapkv", "h2o", "adakv", "pyramidkv", "tova")}
    assert {name: one.numbers for name, one in made.items()} == {
        "snapkv": ("strength",),
        "h2o": ("sum", "strength"),
        "adakv": ("strength",),
        "pyramidkv": ("strength",),
        "tova": ("strength",),
    }
    assert [one.num_queries for one in made.values()] == [64, 0, 64, 64, 1]
    assert [one.heads for one in made.values()] == ["uniform", "uniform", "adaptive", "uniform", "uniform"]
    assert made["pyramidkv"].schedule == "pyramid"
    moments, _ = fitted("criticalkv", base="expected_attention", layer=2)
    assert (moments.wants_moments, moments.layer, moments.inner.layer) == (True, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": "quest"}, r"criticalkv\(base=quest\): this selection gives no scores of its own"),
        ({"base": "kvzip"}, r"criticalkv\(base=kvzip\): this selection gives no scores of its own"),
        ({"base": "criticalkv"}, r"criticalkv\(base=criticalkv\): this selection gives no scores of its own"),
        ({"base": "snapvk"}, r"Unknown selection criticalkv\(base\) 'snapvk'\. Did you mean 'snapkv'\?"),
        ({"ratio": 1.5}, r"criticalkv\(ratio\) is 1\.5; it must be at least 0\.0 and at most 1\.0\."),
    ],
)
def test_others_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        fitted("criticalkv", **arguments)
