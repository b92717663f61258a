"""Whole prompts: stored as if their tokens had come one by one, or, with a selection, the best of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import kept_positions
from kvjax.cache import PromptTokens
from kvjax.empty import empty_cache
from kvjax.filling import QUERY_WINDOW, fill, last_queries_of, waits
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.rounds import append
from kvjax.sharding import Placement
from tests.contract.codecs import model, random_tokens, statistics
from tests.fitted import normal
from tests.kvjax.test_rounds import SHAPE, step

EXACT = "+exact(sinks=2,window=8,round=8)"


def prompt_of(keys, values, positions, **numbers):
    """A prompt, `B T K D`, whose queries are all zero."""
    return PromptTokens(
        keys=jnp.swapaxes(keys, 1, 2),
        values=jnp.swapaxes(values, 1, 2),
        positions=jnp.asarray(positions, jnp.int32),
        numbers=numbers,
        last_queries=jnp.zeros((keys.shape[0], QUERY_WINDOW, 8, 16)),
        replayed=jnp.int32(0),
    )


filled = jax.jit(fill, static_argnames="placement")


def test_filling_equals_appending():
    layer = empty_cache(SHAPE, policy=Policy(), batch=2, max_tokens=10).layers[0]
    keys, values = (jnp.asarray(normal(2, 7, 4, 16, seed=seed), jnp.bfloat16) for seed in (0, 1))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    one = filled(layer, prompt_of(keys, values, positions), placement=Placement()).exact
    other = append(layer.exact, keys, values=values, positions=positions, placement=Placement())
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("num_tokens", [1, 12, 13, 14, 21, 22, 29, 30])
def test_a_prompt_is_filled_as_if_its_tokens_came_one_by_one(num_tokens):
    """For a whole row and a shorter one beside it: the same slots, the same positions."""
    policy = parse_policy("none+exact(sinks=2,window=3,round=8)")
    start = empty_cache(SHAPE, policy=policy, batch=2, max_tokens=30)
    lengths = jnp.asarray([num_tokens, max(num_tokens - 9, 1)])
    offsets = jnp.arange(num_tokens)[None]
    positions = jnp.where(offsets < lengths[:, None], offsets, -1)
    keys = jnp.broadcast_to(offsets[..., None, None], (2, num_tokens, 4, 16)).astype(jnp.bfloat16)
    ours = filled(start.layers[0], prompt_of(keys, -keys, positions), placement=Placement())
    for row, length in enumerate(lengths.tolist()):
        stepped = start
        for position in range(length):
            stepped = step(stepped, position)
        theirs = stepped.layers[0]
        for one, witness in ((ours.exact, theirs.exact), (ours.body, theirs.body)):
            np.testing.assert_array_equal(one.positions[row], witness.positions[row])
        live = np.asarray(theirs.exact.positions[row]) >= 0
        np.testing.assert_array_equal(ours.exact.keys[row][:, live], theirs.exact.keys[row][:, live])
        live = np.asarray(theirs.body.positions[row, 0]) >= 0
        np.testing.assert_array_equal(
            ours.body.values[0].planes[0][row][:, live], theirs.body.values[0].planes[0][row][:, live]
        )


@pytest.mark.parametrize("terms", ["", "+heads(adaptive,floor=0.0)", "+int4"])
def test_a_prompt_under_a_budget_keeps_the_best_with_their_evidence(terms):
    """Keys of known norms: `knorm` keeps the smallest, and what was gathered for a token goes with it."""
    policy = parse_policy(f"h2o(budget=34){terms}{EXACT}")
    layer = empty_cache(SHAPE, policy=policy, batch=2, max_tokens=200).layers[0]
    keys, values = (jnp.asarray(normal(2, 60, 4, 16, seed=seed), jnp.bfloat16) for seed in (0, 1))
    lengths = np.asarray([60, 41])
    positions = np.where(np.arange(60) < lengths[:, None], np.arange(60), -1)
    mass = normal(2, 4, 60, seed=2)
    layer = filled(layer, prompt_of(keys, values, positions, sum=jnp.asarray(mass)), placement=Placement())
    body, state = layer.body, layer.state
    owners = np.broadcast_to(np.arange(4)[:, None], (2, 4, body.num_slots)) if body.owners is None else None
    for row, length in enumerate(lengths):
        coded = -(-(length - 18) // 8) * 8
        best = np.argsort(-mass[row, :, 2 : 2 + coded], axis=1)[:, :24] + 2
        where = np.asarray(body.positions[row])
        if owners is not None:
            for head in range(4):
                held = where[head][where[head] >= 0]
                np.testing.assert_array_equal(held, np.sort(best[head]))
                np.testing.assert_array_equal(state.body["sum"][row, head, : len(held)], mass[row, head, held])
        else:
            flat = np.sort(mass[row, :, 2 : 2 + coded].reshape(-1))[::-1][: 4 * 24]
            np.testing.assert_array_equal(np.sort(np.asarray(state.body["sum"])[row, 0][where[0] >= 0])[::-1], flat)
        recent = np.asarray(layer.exact.positions[row])
        slots = np.flatnonzero(recent >= 0)
        assert set(recent[slots]) == {0, 1, *range(2 + coded, length)}
        np.testing.assert_array_equal(state.exact["sum"][row][:, slots], mass[row][:, recent[slots]])


def test_a_prompt_waits_only_where_layers_must_agree_or_it_is_read_twice():
    def first(policy, **changes):
        sizes = {"policy": policy + EXACT, "batch": 1, "max_tokens": 100, **changes}
        return kvjax.init_cache(model(), sizes.pop("policy"), **sizes, statistics=statistics()).layers[0]

    assert not waits(first("triattention(budget=32)"))
    assert waits(first("triattention(budget=32,mode=head)"))
    assert waits(first("kvzip(budget=32)"))
    assert not waits(first("kvzip(budget=32)", max_tokens=18))  # all fits the exact segment
    assert not waits(first("none"))


def test_what_waited_is_stored_and_nothing_of_it_is_left():
    cache = kvjax.init_cache(model(), "kvzip(budget=32,chunk=16)" + EXACT, batch=2, max_tokens=100)
    lengths = jnp.asarray([50, 37], jnp.int32)
    _, cache = kvjax.prefill(model(), cache, jnp.asarray(random_tokens(2, 50)), lengths=lengths)
    assert all(layer.prompt is None for layer in cache.layers)
    for row, length in enumerate((50, 37)):
        coded = -(-(length - 18) // 8) * 8
        for layer in kept_positions(cache, row=row):
            assert all(len(head) == min(coded, 22) + length - coded for head in layer)


def test_the_last_queries_of_each_row():
    queries = jnp.asarray(normal(2, 40, 4, 16))
    found = last_queries_of(queries, jnp.asarray([40, 3], jnp.int32))
    np.testing.assert_array_equal(found[0], queries[0, ::-1][:QUERY_WINDOW])
    np.testing.assert_array_equal(found[1, :3], queries[1, 2::-1])
    assert float(jnp.abs(found[1, 3:]).sum()) == 0
