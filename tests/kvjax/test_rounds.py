"""How tokens move: into the ring, from there into the body, and whole prompts at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.empty import empty_cache
from kvjax.grammar import parse_policy
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.rounds import append, make_room, room
from kvjax.sharding import Placement

SHAPE = ModelShape(num_layers=1, num_query_heads=8, num_kv_heads=4, head_size=16, dtype="bfloat16", vocab_size=64)


def make(**changes):
    return empty_cache(SHAPE, **{"policy": Policy(), "batch": 2, "max_tokens": 10, **changes})


def test_positions_are_absolute_and_wrap_in_the_ring():
    """A ring of 4 slots that has seen positions 0 to 5 holds 4, 5, 2, 3."""
    segment = make(batch=1, max_tokens=4).layers[0].exact
    for position in range(6):
        new = jnp.full((1, 1, 4, 16), position, jnp.bfloat16)
        segment = append(segment, new, values=-new, positions=jnp.asarray([[position]]), placement=Placement())
    np.testing.assert_array_equal(segment.positions[0], [4, 5, 2, 3])
    np.testing.assert_array_equal(segment.keys[0, 3, :, 7], [4, 5, 2, 3])
    np.testing.assert_array_equal(segment.values[0, 0, :, 0], [-4, -5, -2, -3])


def test_padding_is_written_nowhere():
    segment = make().layers[0].exact
    new = jnp.ones((2, 3, 4, 16), jnp.bfloat16)
    positions = jnp.asarray([[0, 1, 2], [0, -1, -1]])
    written = append(segment, new, values=new, positions=positions, placement=Placement())
    np.testing.assert_array_equal(written.positions[:, :4], [[0, 1, 2, -1], [0, -1, -1, -1]])
    assert float(written.keys[1].sum()) == 4 * 16


def slots(segment):
    return segment.positions[0].tolist()


@jax.jit
def step(cache, position):
    """One token at a position into every layer, a round before it where one is due."""
    cache = make_room(cache, jnp.ones((2,), bool))
    new = jnp.full((2, 1, 4, 16), position).astype(jnp.bfloat16)
    where = jnp.full((2, 1), position)
    layers = tuple(
        dataclasses.replace(layer, exact=append(layer.exact, new, values=-new, positions=where, placement=Placement()))
        for layer in cache.layers
    )
    return dataclasses.replace(cache, layers=layers, num_seen=cache.num_seen + 1)


def test_a_token_lives_in_the_ring_and_then_in_the_body():
    """2 sinks, a window of 3, rounds of 8: the 14th token finds the ring full, and the eight oldest move."""
    policy = parse_policy("none+exact(sinks=2,window=3,round=8)")
    cache = empty_cache(SHAPE, policy=policy, batch=2, max_tokens=30)
    assert cache.layers[0].exact.num_slots == 13
    assert cache.layers[0].body.num_slots == 24
    for position in range(13):
        cache = step(cache, position)
    exact, body = cache.layers[0].exact, cache.layers[0].body
    assert slots(exact) == list(range(13))
    assert int(jnp.max(body.positions)) == -1
    assert room(cache).tolist() == [0, 0]
    cache = step(cache, 13)
    exact, body = cache.layers[0].exact, cache.layers[0].body
    assert slots(exact) == [0, 1, 13, -1, -1, -1, -1, -1, -1, -1, 10, 11, 12]
    assert body.positions[0, 0, :9].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, -1]
    np.testing.assert_array_equal(body.keys[0].planes[0][0, 1, :8, 5], range(2, 10))
    np.testing.assert_array_equal(body.values[0].planes[0][1, 0, :8, 0], range(-2, -10, -1))
    for position in range(14, 30):
        cache = step(cache, position)
    held = slots(cache.layers[0].exact) + cache.layers[0].body.positions[0, 0].tolist()
    assert sorted(position for position in held if position >= 0) == list(range(30))


def test_rows_come_due_at_their_own_steps():
    """A row that is not due keeps its body and its ring as they are."""
    policy = parse_policy("none+exact(sinks=0,window=0,round=8)")
    cache = empty_cache(SHAPE, policy=policy, batch=2, max_tokens=30)
    for position in range(8):
        cache = step(cache, position)
    layers = tuple(
        dataclasses.replace(
            layer, exact=dataclasses.replace(layer.exact, positions=layer.exact.positions.at[1, 7].set(-1))
        )
        for layer in cache.layers
    )
    cache = dataclasses.replace(cache, layers=layers, num_seen=jnp.asarray([8, 7]))
    still = make_room(cache, jnp.asarray([False, True]))
    for ours, theirs in zip(jax.tree.leaves(still), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg="a row that gets no token stays as it is")
    cache = make_room(cache, jnp.asarray([True, True]))
    exact, body = cache.layers[0].exact, cache.layers[0].body
    assert exact.positions.tolist() == [[-1] * 8, [0, 1, 2, 3, 4, 5, 6, -1]]
    assert body.positions[:, 0, :9].tolist() == [[*range(8), -1], [-1] * 9]


@pytest.mark.parametrize(
    ("kind", "text", "primitive"),
    [
        ("TPU v6 lite", "none", "cond"),
        ("TPU v6 lite", "int8", "while"),
        ("TPU v6 lite", "key(int8)", "cond"),
        ("NVIDIA H200", "none", "while"),
        ("cpu", "int8", "while"),
    ],
)
def test_what_is_copied_least_runs_a_round(monkeypatch, kind, text, primitive):
    """A branch for floats on TPUs, a loop for all else; they come to the same."""
    policy = parse_policy(f"{text}+exact(sinks=0,window=0,round=8)")
    cache = empty_cache(SHAPE, policy=policy, batch=2, max_tokens=30)
    for position in range(8):
        cache = step(cache, position)
    monkeypatch.setattr(Placement, "device_kind", kind)
    everywhere = jnp.ones((2,), bool)
    operations = {
        equation.primitive.name for equation in jax.make_jaxpr(lambda one: make_room(one, everywhere))(cache).eqns
    }
    assert operations & {"cond", "while"} == {primitive}
    for due in (everywhere, ~everywhere):
        found = []
        for name in (kind, "cpu"):
            monkeypatch.setattr(Placement, "device_kind", name)
            found.append(jax.tree.leaves(make_room(cache, due)))
        for ours, theirs in zip(*found, strict=True):
            np.testing.assert_array_equal(ours, theirs)
