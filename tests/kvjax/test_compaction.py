"""Slots of tokens that go are taken by those that come; nothing that stays is moved."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax._kernels import read_parts
from kvjax.compaction import absorb, fill_kept, index_of, put_numbers, seen_body, take_numbers
from kvjax.empty import empty_body
from kvjax.evidence import empty_evidence
from kvjax.rounds import encode
from kvjax.selection import SELECTIONS
from kvjax.sharding import Placement
from tests.fitted import fitted, normal, shape_of

SHAPE = shape_of(head_size=16)
HEADS, SLOTS, NEW = 2, 16, 8


def body_of(codec, *, pooled=False, slots=SLOTS, **arguments):
    pairs = [fitted(codec, role, shape=SHAPE, **arguments) for role in ("keys", "values")]
    sizes = {"batch": 2, "num_slots": slots * (HEADS if pooled else 1), "heads": 1 if pooled else HEADS}
    codecs, arrays = zip(*pairs, strict=True)
    return empty_body(codecs, arrays, **sizes, pooled=pooled, placement=Placement())


def state_of(body):
    sizes = {"batch": 2, "exact_slots": 4, "body": (body.positions.shape[1], body.num_slots)}
    return empty_evidence(SELECTIONS.get("h2o")(), {}, shape=SHAPE, **sizes, placement=Placement())


def come(body, state, *, first, kept, due=(True, True), unit=1, seed=0):
    """A round in which tokens `first`, `first` + 1, ... come."""
    keys, values = (jnp.asarray(normal(2, HEADS, NEW, 16, seed=seed + role)) for role in (0, 1))
    positions = jnp.broadcast_to(first + jnp.arange(NEW, dtype=jnp.int32), (2, NEW))
    codes = encode(body, (keys, values), positions=positions, placement=Placement())
    numbers = {"sum": jnp.asarray(normal(2, HEADS, NEW, seed=seed + 5))}
    arguments = {"positions": positions, "numbers": numbers, "kept": jnp.asarray(kept), "due": jnp.asarray(due)}
    body, state = jax.jit(absorb, static_argnames=("unit", "placement"))(
        body, state, codes, **arguments, unit=unit, placement=Placement()
    )
    return body, state, np.asarray(keys), np.asarray(numbers["sum"])


def test_index_of_lists_the_first_that_are_kept():
    kept = jnp.asarray(np.random.default_rng(0).random((2, 3, 40)) < 0.4)
    for size in (4, 40, 60):
        found = np.asarray(index_of(kept, size))
        for row, head in np.ndindex(2, 3):
            expected = np.flatnonzero(kept[row, head])[:size]
            np.testing.assert_array_equal(
                found[row, head], np.pad(expected, (0, size - len(expected)), constant_values=-1)
            )


def test_numbers_are_taken_and_put_by_units():
    array = jnp.asarray(normal(1, 2, 12))
    index = jnp.asarray([[[2, -1], [0, 1]]], jnp.int32)
    taken = np.asarray(take_numbers(array, index, unit=4, empty=7.0))
    np.testing.assert_array_equal(taken[0, 0], [*array[0, 0, 8:], *[7.0] * 4])
    np.testing.assert_array_equal(taken[0, 1], array[0, 1, :8])
    put = np.asarray(put_numbers(array, jnp.zeros((1, 2, 8)), index, unit=4))
    np.testing.assert_array_equal(put[0, 0], [*array[0, 0, :8], *[0.0] * 4])
    np.testing.assert_array_equal(put[0, 1], [*[0.0] * 8, *array[0, 1, 8:]])


@pytest.mark.parametrize("codec", ["none", "int4", "int2", "turboquant"])
def test_what_stays_keeps_its_slot_and_its_bytes(codec):
    """Two rounds fill the body; in the third three tokens of each head go and three of those that come stay."""
    body, state = body_of(codec), None
    state = state_of(body)
    everything = np.ones((2, HEADS, SLOTS + NEW), bool)
    body, state, *_ = come(body, state, first=0, kept=np.where(np.arange(SLOTS + NEW) < SLOTS, False, everything))
    body, state, *_ = come(body, state, first=8, kept=np.where(np.arange(SLOTS + NEW) < 8, True, everything), seed=20)
    np.testing.assert_array_equal(body.positions, np.broadcast_to(np.arange(SLOTS), (2, HEADS, SLOTS)))
    before, sums = np.asarray(read_parts(body.keys)), np.asarray(state.body["sum"])
    kept = np.zeros((2, HEADS, SLOTS + NEW), bool)
    kept[:, :, :SLOTS] = True
    gone = {0: [0, 1, 9], 1: [5, 6, 15]}
    for head, slots in gone.items():
        kept[:, head, slots] = False
        kept[:, head, SLOTS + np.asarray([1, 4, 7])] = True
    after, state, keys, numbers = come(body, state, first=16, kept=kept, due=(True, False), seed=40)
    read, positions = np.asarray(read_parts(after.keys)), np.asarray(after.positions)
    for head, slots in gone.items():
        stay = [slot for slot in range(SLOTS) if slot not in slots]
        np.testing.assert_array_equal(read[0, head, stay], before[0, head, stay])
        np.testing.assert_array_equal(positions[0, head, slots], [17, 20, 23])
        np.testing.assert_array_equal(state.body["sum"][0, head, jnp.asarray(slots)], numbers[0, head, [1, 4, 7]])
        if codec == "none":
            np.testing.assert_array_equal(read[0, head, slots], keys[0, head, [1, 4, 7]])
    np.testing.assert_array_equal(read[1], before[1])
    np.testing.assert_array_equal(positions[1], body.positions[1])
    np.testing.assert_array_equal(state.body["sum"][1], sums[1])


def test_slots_of_tokens_that_go_are_empty_where_fewer_come():
    body = body_of("none")
    state = state_of(body)
    kept = np.zeros((2, HEADS, SLOTS + NEW), bool)
    kept[:, :, SLOTS:] = True
    body, state, *_ = come(body, state, first=0, kept=kept)
    kept = np.zeros((2, HEADS, SLOTS + NEW), bool)
    kept[:, 0, :3] = kept[:, 1, SLOTS + 2] = True
    body, state, *_ = come(body, state, first=8, kept=kept)
    assert [sorted(head[head >= 0].tolist()) for head in np.asarray(body.positions)[0]] == [[0, 1, 2], [10]]


def test_units_move_as_one():
    body = body_of("kivi", bits=2, group=8)
    state = state_of(body)
    kept = np.zeros((2, HEADS, 3), bool)
    kept[:, :, 2] = True
    body, state, *_ = come(body, state, first=0, kept=kept, unit=8)
    body, state, *_ = come(body, state, first=8, kept=np.tile([True, False, True], (2, 2, 1)), unit=8)
    before = np.asarray(read_parts(body.keys))
    after, *_ = come(body, state, first=16, kept=np.tile([False, True, True], (2, 2, 1)), unit=8)
    read = np.asarray(read_parts(after.keys))
    np.testing.assert_array_equal(after.positions[0, 0], [*range(16, 24), *range(8, 16)])
    np.testing.assert_array_equal(read[:, :, 8:], before[:, :, 8:])


def test_a_pool_gives_slots_of_one_head_to_another_and_each_head_sees_its_own():
    body = body_of("int4", pooled=True, slots=8)
    state = state_of(body)
    kept = np.zeros((2, HEADS, SLOTS + NEW), bool)
    kept[:, :, SLOTS:] = True
    body, state, first, _ = come(body, state, first=0, kept=kept)
    assert body.positions.shape == (2, 1, 16)
    kept = np.zeros((2, HEADS, SLOTS + NEW), bool)
    kept[:, 0, :2] = True  # head 0 keeps tokens 0 and 1, head 1 none of its own: the pool's slots 8 to 15
    kept[:, 1, SLOTS:] = True
    body, state, second, _ = come(body, state, first=8, kept=kept, seed=30)
    _, _, positions, numbers = seen_body(body, state, SHAPE)
    held = [sorted(head[head >= 0].tolist()) for head in np.asarray(positions)[0]]
    assert held == [[0, 1], list(range(8, 16))]
    keys = np.asarray(seen_body(body, state, SHAPE)[0].read())
    for head, (source, offset) in enumerate(((first, 0), (second, 8))):
        for slot in np.flatnonzero(np.asarray(positions)[0, head] >= 0):
            token = int(positions[0, head, slot]) - offset
            close = np.linalg.norm(keys[0, head, slot] - source[0, head, token])
            assert close < 0.3 * np.linalg.norm(source[0, head, token])
    assert (np.asarray(numbers["sum"])[np.asarray(positions) < 0] == 0).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_a_prompt_fills_a_body_with_what_is_kept_of_it(pooled):
    scratch, body = body_of("int4", slots=32), body_of("int4", pooled=pooled)
    keys, values = jnp.asarray(normal(2, HEADS, 32, 16)), jnp.asarray(normal(2, HEADS, 32, 16, seed=1))
    positions = jnp.broadcast_to(4 + jnp.arange(32, dtype=jnp.int32), (2, 32))
    codes = encode(scratch, (keys, values), positions=positions, placement=Placement())
    scratch = dataclasses.replace(scratch, keys=codes[0], values=codes[1])
    kept = np.random.default_rng(0).random((2, HEADS, 32)) < 0.3
    numbers = {"sum": jnp.asarray(normal(2, HEADS, 32, seed=3))}
    arguments = {"positions": positions, "numbers": numbers, "kept": jnp.asarray(kept), "unit": 1}
    body, state = fill_kept(body, state_of(body), scratch, **arguments, placement=Placement())
    stored, _, where, sums = seen_body(body, state, SHAPE)
    found = stored.read()
    whole = np.asarray(scratch.codecs[0].decode(scratch.keys, positions=positions[:, None], arrays=scratch.arrays(0)))
    for row, head in np.ndindex(2, HEADS):
        slots = np.flatnonzero(np.asarray(where)[row, head] >= 0)
        tokens = np.asarray(where)[row, head, slots] - 4
        np.testing.assert_array_equal(tokens, np.flatnonzero(kept[row, head]))
        np.testing.assert_array_equal(np.asarray(found)[row, head, slots], whole[row, head, tokens])
        np.testing.assert_array_equal(np.asarray(sums["sum"])[row, head, slots], numbers["sum"][row, head, tokens])
