"""What is kept of candidates: protections, ties, units, heads that share storage, heads that compete for a budget."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.eviction import Candidates
from kvjax.grammar import parse_policy
from kvjax.keeping import kept_units
from kvjax.selection import View
from tests.fitted import normal, shape_of

SHAPE = shape_of(head_size=16)


def candidates_of(policy, *, count=24, quota=10, unit=1, protected=(), held=None, slots=None):
    """Candidates at positions 0, 1, ..., of one row and two heads."""
    policy = parse_policy(policy)
    positions = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (1, 2, count))
    safe = np.zeros((1, 2, count), bool)
    safe[:, :, list(protected)] = True
    held = np.ones((1, 2, count), bool) if held is None else held
    pooled = policy.heads.kind == "adaptive"
    plan = policy.plan(0, shape=SHAPE, max_tokens=4096)
    slots = slots or quota * (2 if pooled else 1)
    plan = dataclasses.replace(plan, quota=quota, unit=unit, pooled=pooled, slots=slots)
    view = View(
        keys=None,
        values=None,
        positions=jnp.where(jnp.asarray(held), positions, -1),
        scorable=jnp.asarray(held & ~safe),
        num_seen=jnp.full((1,), count, jnp.int32),
        quotas=jnp.full((1, 2), quota, jnp.int32),
        numbers={},
        queries=None,
        query_positions=None,
        moments=None,
        arrays={},
        shape=SHAPE,
    )
    totals = jnp.full((1, 2), quota, jnp.int32)
    return Candidates(
        view=view, start=0, count=count, protected=jnp.asarray(safe), totals=totals, plan=plan, policy=policy
    )


def kept(candidates, scores):
    """The places that are kept, by head."""
    (found,) = kept_units([candidates], [jnp.asarray(scores, jnp.float32)])
    return [np.flatnonzero(head).tolist() for head in np.asarray(found)[0]]


def test_ties_keep_the_protected_and_the_newest():
    same = np.zeros((1, 2, 24))
    assert kept(candidates_of("knorm", protected=(1, 5)), same) == [[1, 5, *range(16, 24)]] * 2


@pytest.mark.parametrize("score", [np.finfo(np.float32).max, np.inf, 300.0])
def test_no_score_is_above_protection(score):
    scores = np.full((1, 2, 24), score)
    scores[:, :, [3, 4]] = -np.finfo(np.float32).max
    found = kept(candidates_of("knorm", protected=(3, 4)), scores)
    assert all({3, 4} <= set(head) and len(head) == 10 for head in found)


def test_nan_is_the_worst_score_and_minus_infinity_is_never_kept():
    scores = normal(1, 2, 24)
    scores[0, 0, :20] = np.nan
    scores[0, 1, 4:] = -np.inf
    first, second = kept(candidates_of("knorm"), scores)
    assert first == list(range(14, 24))  # the four others, and the newest of the rest
    assert second == [0, 1, 2, 3]


def test_empty_slots_are_never_kept():
    held = np.ones((1, 2, 24), bool)
    held[:, :, 6:] = False
    assert kept(candidates_of("knorm", held=held), np.zeros((1, 2, 24))) == [list(range(6))] * 2


def test_units_go_by_the_mean_of_their_tokens_and_are_protected_by_one():
    scores = np.zeros((1, 2, 24))
    scores[:, :, 4:8] = [9.0, 0.0, 0.0, 0.0]  # mean 2.25
    scores[:, :, 12:16] = 2.0
    scores[:, :, 8:12] = -1.0
    found = kept(candidates_of("knorm", quota=12, unit=4, protected=(10,)), scores)
    assert found == [[1, 2, 3]] * 2  # units 4-7, 8-11 (protected), 12-15


def test_what_is_favoured_comes_after_what_is_pinned_and_before_all_scores():
    """More favoured tokens than the budget holds: the pinned ones stay, the newest of the favoured follow."""
    scores = normal(1, 2, 24)
    favoured = np.zeros((1, 2, 24), bool)
    favoured[:, :, 2:20] = True
    one = candidates_of("knorm", protected=(0, 1))
    one = dataclasses.replace(one, preferred=jnp.asarray(favoured))
    assert kept(one, scores) == [[0, 1, *range(12, 20)]] * 2
    scores[0, 1] = -np.inf
    assert kept(one, scores)[1] == [0, 1]


def test_heads_that_share_their_storage_keep_the_same_tokens():
    scores = normal(1, 2, 24)
    one = candidates_of("knorm+key(lowrank,rank=16,heads=2)")
    first, second = kept(one, scores)
    best = np.argsort(-scores.max(axis=1)[0])[:10]
    assert first == second == sorted(best.tolist())


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("quota", [10, 7])
def test_a_pool_holds_the_best_of_all_heads_above_each_heads_floor(floor, quota):
    """The rule in plain Python: every head keeps its best floor * quota, the rest are the best that are left."""
    scores = normal(1, 2, 24) + np.asarray([0.0, 3.0])[None, :, None]
    one = candidates_of(f"knorm+heads(adaptive,floor={floor})", quota=quota)
    found = kept(one, scores)
    safe = {(head, int(slot)) for head in range(2) for slot in np.argsort(-scores[0, head])[: int(floor * quota)]}
    rest = sorted(((head, slot) for head in range(2) for slot in range(24)), key=lambda place: -scores[0][place])
    expected = list(safe) + [place for place in rest if place not in safe][: 2 * quota - len(safe)]
    assert sum(map(len, found)) == 2 * quota
    assert {(head, slot) for head, slots in enumerate(found) for slot in slots} == set(expected)


def test_of_equal_scores_a_pool_keeps_the_newest_and_of_one_token_the_first_head():
    found = kept(candidates_of("knorm+heads(adaptive,floor=0.0)", quota=5, slots=9), np.zeros((1, 2, 24)))
    assert found == [list(range(19, 24)), list(range(20, 24))]


def test_layers_of_different_sizes_are_selected_together():
    many = [candidates_of("knorm", count=count, quota=quota) for count, quota in ((24, 10), (16, 4), (24, 3))]
    scores = [jnp.asarray(normal(1, 2, one.count, seed=index)) for index, one in enumerate(many)]
    found = jax.jit(lambda scores: kept_units(many, scores))(scores)
    for one, score, stays in zip(many, scores, found, strict=True):
        best = np.argsort(-np.asarray(score), axis=2)[:, :, : one.plan.quota]
        assert (
            np.sort(np.argsort(~np.asarray(stays), axis=2, kind="stable")[:, :, : one.plan.quota]) == np.sort(best)
        ).all()
