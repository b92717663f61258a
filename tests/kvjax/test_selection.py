"""What every selection has, and the view that it looks at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.selection import DEFAULT_BUDGET, NUMBERS, SELECTIONS, Selection
from tests.views import fitted, random_view, scores_of, shape_of

NAMES = [
    "adakv",
    "criticalkv",
    "duo",
    "expected_attention",
    "h2o",
    "keydiff",
    "knorm",
    "kvzip",
    "lagkv",
    "pyramidkv",
    "quest",
    "random",
    "rkv",
    "scissorhands",
    "snapkv",
    "streaming",
    "tova",
    "triattention",
]


def test_defaults():
    selection = Selection()
    assert (selection.budget, selection.layer) == (DEFAULT_BUDGET, 0)
    assert (selection.numbers, selection.wants_moments, selection.num_queries, selection.replay) == ((), False, 0, 0)
    assert (selection.heads, selection.schedule, selection.needs_pool, selection.page) == (
        "uniform",
        "uniform",
        False,
        0,
    )
    assert (selection.shares, selection.waits, selection.head_share(3)) == ("none", False, 1.0)


@pytest.mark.parametrize(
    ("budget", "tokens"),
    [(512, 512), (1, 1), (0.25, 1024), (1.0, 4096), (0.1, 410), (0.0001, 0), (DEFAULT_BUDGET, 2048)],
)
def test_a_budget_is_tokens_or_a_share(budget, tokens):
    assert Selection(budget=budget).tokens(4096) == tokens


def test_a_selection_without_a_rule():
    view = random_view()
    with pytest.raises(NotImplementedError):
        Selection().score(view)
    assert Selection().favoured(view, jnp.zeros(view.positions.shape)) is None


def test_fit_settles_the_layer():
    for layer in (0, 2):
        selection, arrays = fitted("knorm", layer=layer, budget=64)
        assert (selection.layer, selection.budget, arrays) == (layer, 64, {})


def test_all_selections_are_registered():
    assert list(SELECTIONS.names()) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("duo", "triattention")])
def test_selections_are_static(name):
    """Two of the same arguments are one to the compiler; what they ask for can be gathered."""
    one, other = (fitted(name, budget=100)[0] for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert dataclasses.replace(one, budget=200) != one
    assert set(one.numbers) <= set(NUMBERS)
    assert sum(number != "strength" for number in one.numbers) <= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("duo", "quest", "triattention")])
def test_scores_are_float32_numbers(name):
    selection = fitted(name, **({"lag": 8} if name == "lagkv" else {}))[0]
    view = random_view(numbers=selection.numbers, moments=selection.wants_moments)
    scores = scores_of(selection, view)
    assert (scores.dtype, scores.shape) == (np.float32, view.positions.shape)
    assert np.isfinite(scores[view.positions >= 0]).all()
    assert len(np.unique(scores[0, 0][view.scorable[0, 0]])) > 3


def test_a_view_knows_its_slots_and_groups():
    view = random_view(shape=shape_of(query_heads=6))
    assert view.group == 3
    held = dataclasses.replace(view, positions=jnp.asarray(view.positions)).held
    np.testing.assert_array_equal(held, view.positions >= 0)


def test_a_views_keys_are_one_piece_unless_they_are_stored_in_several():
    view = random_view()
    piece = jax.tree.map(jnp.asarray, view.pieces[0])
    assert len(view.pieces) == 1
    np.testing.assert_array_equal(piece.read(), view.keys)
    np.testing.assert_array_equal(piece.positions, view.positions)
    assert dataclasses.replace(view, stored=(piece, piece)).pieces == (piece, piece)
