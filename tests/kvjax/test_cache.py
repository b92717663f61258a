"""The cache as a pytree: shapes, rings, bytes, and the abstract cache that compiles without memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import kvjax
from kvjax.accounting import full_cache_bytes
from kvjax.empty import abstract_cache, empty_cache
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.sharding import Placement, make_mesh

SHAPE = ModelShape(num_layers=2, num_query_heads=8, num_kv_heads=4, head_size=16, dtype="bfloat16", vocab_size=64)


def make(**changes):
    return empty_cache(SHAPE, **{"policy": Policy(), "batch": 2, "max_tokens": 10, **changes})


def test_shapes_and_empty_values():
    cache = make()
    assert len(cache.layers) == 2
    exact = cache.layers[0].exact
    assert exact.keys.shape == exact.values.shape == (2, 4, 10, 16)
    assert exact.keys.dtype == jnp.bfloat16
    assert exact.num_slots == 10
    np.testing.assert_array_equal(exact.positions, np.full((2, 10), -1))
    np.testing.assert_array_equal(cache.num_seen, [0, 0])
    assert cache.layers[0].body is None


def test_a_cache_survives_tree_operations_with_its_static_facts():
    cache = make()
    doubled = jax.tree.map(lambda leaf: leaf * 2, cache)
    assert (doubled.policy, doubled.shape, doubled.max_tokens) == (cache.policy, SHAPE, 10)
    assert jax.tree.structure(doubled) == jax.tree.structure(cache)
    assert dataclasses.replace(cache, num_seen=cache.num_seen + 1).num_seen.tolist() == [1, 1]


def test_bytes_come_from_buffers_and_equal_the_shapes():
    cache = make()
    by_hand = 2 * (2 * 2 * 4 * 10 * 16 * 2)
    assert kvjax.device_bytes(cache.layers) == by_hand + 2 * 2 * 10 * 4  # positions
    assert full_cache_bytes(cache) == by_hand


def test_bytes_of_a_spread_cache_count_copies():
    """Four heads over two chips are cut; over eight chips they are copied to each."""
    cut = make(batch=4, placement=Placement(make_mesh(data=4, model=2)))
    copied = make(batch=4, placement=Placement(make_mesh(data=1, model=8)))
    one = kvjax.device_bytes(make(batch=4).layers[0].exact.keys)
    assert kvjax.device_bytes(cut.layers[0].exact.keys) == one
    assert kvjax.device_bytes(copied.layers[0].exact.keys) == 8 * one
    for cache in (cut, copied):
        held = sum(kvjax.device_bytes((layer.exact.keys, layer.exact.values)) for layer in cache.layers)
        assert full_cache_bytes(cache) == held


def test_the_abstract_cache_is_the_cache_without_memory():
    for placement in (Placement(), Placement(make_mesh(data=2, model=4))):
        real = make(placement=placement)
        abstract = abstract_cache(SHAPE, policy=Policy(), batch=2, max_tokens=10, placement=placement)
        assert jax.tree.structure(real) == jax.tree.structure(abstract)
        for leaf, described in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
            assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
            if placement.mesh is not None:
                assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim)
