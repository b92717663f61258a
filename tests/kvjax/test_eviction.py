"""What a selection looks at: all that a layer holds, with what is protected taken out; and layers that agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax import rounds
from kvjax.accounting import kept_positions
from kvjax.eviction import Row, agree, round_candidates, units_of
from tests.contract.codecs import model, random_tokens, statistics

EXACT = "+exact(sinks=2,window=8,round=8)"


def full_ring(policy, *, batch=2, prompt=42, more=0):
    """A cache whose ring is full, and the candidates of its first layer's next round."""
    cache = kvjax.init_cache(model(), policy + EXACT, batch=batch, max_tokens=200, statistics=statistics())
    tokens = random_tokens(batch, 100)
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :prompt]))
    if more:
        _, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(tokens[:, prompt : prompt + more]))
    assert (np.asarray(rounds.room(cache)) == 0).all()
    return cache


def look(cache):
    layer, due = cache.layers[0], jnp.ones(cache.num_seen.shape, bool)
    moved, _ = rounds._oldest(layer, due)
    after = moved.positions[:, -1:] + 1
    newest, _ = rounds._of_ring(layer, after + jnp.arange(8, dtype=jnp.int32)[None], due)
    row = Row(num_seen=cache.num_seen, num_pinned=cache.num_pinned)
    return round_candidates(layer, moved, newest, row=row, placement=cache.placement)


def test_a_view_holds_every_token_once_with_its_own_key():
    """Against the keys of the uncompressed cache: those of the first layer do not depend on what is kept."""
    cache = full_ring("streaming(budget=26)")
    view = jax.jit(look)(cache).view
    whole = kvjax.init_cache(model(), "full", batch=2, max_tokens=200)
    _, whole = kvjax.prefill(model(), whole, jnp.asarray(random_tokens(2, 100)[:, : int(cache.num_seen[0])]))
    keys = np.asarray(whole.layers[0].exact.keys)
    positions = np.asarray(view.positions)
    for row, head in np.ndindex(2, 2):
        held = positions[row, head][positions[row, head] >= 0]
        np.testing.assert_array_equal(np.sort(held), kept_positions(cache, row=row)[0][head])
        slots = np.flatnonzero(positions[row, head] >= 0)
        found = np.asarray(view.keys)[row, head, slots]
        np.testing.assert_allclose(found, keys[row, head, positions[row, head, slots]], rtol=0, atol=1e-5)


def test_keys_where_they_lie_are_those_of_the_view_whatever_empty_slots_hold():
    cache = full_ring("streaming(budget=60)")
    layer = cache.layers[0]
    empty = (layer.body.positions < 0)[..., None]
    assert np.asarray(empty).any()
    spoilt = tuple(part.map_tokens(lambda array, **_: jnp.where(empty, jnp.nan, array)) for part in layer.body.keys)
    layer = dataclasses.replace(layer, body=dataclasses.replace(layer.body, keys=spoilt))
    view = jax.jit(look)(dataclasses.replace(cache, layers=(layer, *cache.layers[1:]))).view
    assert len(view.stored) == 4
    sums = view.of_each_key(lambda keys: jnp.stack([keys.sum(axis=3), keys[..., 0]], axis=2))  # B K 2 s
    keys = np.asarray(view.keys)
    np.testing.assert_allclose(sums, np.stack([keys.sum(axis=3), keys[..., 0]], axis=2), rtol=0, atol=1e-5)
    whole = dataclasses.replace(view, stored=None)
    np.testing.assert_allclose(whole.of_each_key(lambda keys: keys.sum(axis=3)), sums[:, :, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("selection", ["triattention", "snapkv"])
@pytest.mark.parametrize("sizes", ["sinks=0,window=8", "sinks=2,window=0"])
def test_no_sinks_or_no_window_will_do(selection, sizes):
    """What there are no slots of is no piece of the keys."""
    policy = f"{selection}(budget=26)+exact({sizes},round=8)"
    cache = kvjax.init_cache(model(), policy, batch=1, max_tokens=60, statistics=statistics())
    tokens = jnp.asarray(random_tokens(1, 60))
    _, cache = kvjax.prefill(model(), cache, tokens[:, :40])
    logits, cache = kvjax.compressed_decode(model(), cache, tokens[:, 40:])
    assert np.isfinite(logits).all()
    assert int(cache.num_seen[0]) == 60


def test_sinks_window_and_pinned_prompt_are_not_scorable():
    cache = full_ring("streaming(budget=26)+prompt(40)", prompt=30, more=28)
    candidates = jax.jit(look)(cache)
    view, seen = candidates.view, int(cache.num_seen[0])
    free = np.asarray(view.positions)[np.asarray(view.scorable)]
    assert free.min() == 30  # after the prompt
    assert free.max() == seen - 9  # before the window
    assert (np.asarray(candidates.totals) == 16 + 28).all()  # the budget's body, and the prompt without the sinks
    assert (np.asarray(view.quotas) == 16).all()


def test_a_prompt_inside_the_budget_leaves_less_for_others():
    candidates = jax.jit(look)(full_ring("streaming(budget=50)+prompt(inside)", prompt=30, more=28))
    assert (np.asarray(candidates.totals) == 40).all()
    assert (np.asarray(candidates.view.quotas) == 40 - 28).all()


def test_values_of_large_norm_are_protected():
    cache = full_ring("streaming(budget=26)+protect(values=0.2)")  # 3 of 16
    candidates = jax.jit(look)(cache)
    protected = np.asarray(candidates.preferred)
    assert not np.asarray(candidates.protected).any()  # nothing is pinned
    assert (protected.sum(axis=2) == 3).all()
    norms = np.linalg.norm(np.asarray(candidates.cut(candidates.view.values)), axis=3)
    assert norms[protected].min() >= norms[~protected & (np.asarray(candidates.cut(candidates.view.held)))].min()
    for row, head in np.ndindex(2, 2):
        best = np.argsort(-norms[row, head])[:3]
        assert set(best) == set(np.flatnonzero(protected[row, head]))


@pytest.mark.parametrize(("mode", "expected"), [("layer", "own"), ("head", "mean"), ("union", "max")])
def test_layers_agree_as_the_selection_says(mode, expected):
    cache = kvjax.init_cache(
        model(), f"triattention(budget=26,mode={mode}){EXACT}", batch=1, max_tokens=200, statistics=statistics()
    )
    scores = {index: jnp.asarray(np.random.default_rng(index).normal(size=(1, 2, 5)), jnp.float32) for index in (0, 1)}
    stacked = np.stack(list(scores.values()))
    found = agree(scores, cache.layers)
    wanted = {
        "own": stacked,
        "mean": np.broadcast_to(stacked.mean(axis=0), stacked.shape),
        "max": np.broadcast_to(stacked.max(axis=(0, 2))[:, None], stacked.shape),
    }[expected]
    for index in (0, 1):
        np.testing.assert_allclose(found[index], wanted[index], rtol=1e-6)


@pytest.mark.parametrize("mode", ["head", "union"])
def test_layers_that_agree_hold_the_same_tokens(mode):
    policy = f"triattention(budget=26,mode={mode}){EXACT}"
    cache = kvjax.init_cache(model(), policy, batch=2, max_tokens=200, statistics=statistics())
    tokens = random_tokens(2, 120)
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(tokens[:, :70]), lengths=jnp.asarray([70, 33], jnp.int32))
    _, cache = kvjax.compressed_decode(model(), cache, jnp.asarray(tokens[:, 70:110]))
    for row in range(2):
        first, second = kept_positions(cache, row=row)
        for head in range(2):
            np.testing.assert_array_equal(first[head], second[head])
        same = np.array_equal(first[0], first[1])
        assert same == (mode == "union")


def test_units_reduce_neighbouring_slots():
    array = jnp.arange(12, dtype=jnp.float32).reshape(1, 1, 12)
    np.testing.assert_array_equal(units_of(array, 4, jnp.max)[0, 0], [3, 7, 11])
    assert units_of(array, 1, jnp.max) is array


def test_rows_carry_counts_alone():
    assert {field.name for field in dataclasses.fields(Row)} == {"num_seen", "num_pinned"}
