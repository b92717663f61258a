"""Channels chosen by the first tokens: those that ThinK drops, as kvpress does, and outliers that go apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.stages.channels import Outliers, Prune, mean_square, one_hot_columns
from kvjax.stages.facts import LayerFacts
from kvjax.stages.linear import forward, rotation
from tests.fitted import normal, shape_of


def settled(transform, size):
    return transform.fit(LayerFacts(shape=shape_of(head_size=size), layer=0, role="keys"))[0]


def all_valid(vectors):
    return jnp.ones((vectors.shape[0], vectors.shape[2]), bool)


@pytest.fixture(scope="module")
def think(golden):
    with np.load(golden / "think.npz") as arrays:
        return dict(arrays)


def test_the_channels_of_kvpress_are_dropped(think):
    """From the same queries and keys: what is kept is all but what kvpress prunes, and comes back unchanged."""
    keys, queries = jnp.asarray(think["keys"]), jnp.swapaxes(jnp.asarray(think["queries"]), 1, 2)
    prune = settled(Prune(ratio=0.5), 64)
    chosen = prune.choose(keys, all_valid(keys), queries)
    for row, head in np.ndindex(2, 2):
        dropped = sorted(set(range(64)) - set(np.asarray(chosen["channels"])[row, head].tolist()))
        np.testing.assert_array_equal(dropped, think["pruned"][row, head])
    matrix = prune.matrix(chosen)
    kept = forward(keys, matrix, heads=1)
    assert kept.shape == (2, 2, 96, 32)
    np.testing.assert_allclose(kept @ jnp.swapaxes(matrix, 2, 3), think["keys_pruned"], rtol=0, atol=1e-6)


def test_the_score_is_that_of_kvpress(think):
    """Mean squares of keys times sums of squares of queries, in the same proportion for all channels."""
    keys = jnp.asarray(think["keys"])
    queries = think["queries"].reshape(2, 2, 2, 32, 64)
    score = np.asarray(mean_square(keys, all_valid(keys))) * np.sum(queries**2, axis=(2, 3))
    ratio = score / think["scores"]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-4)


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 16), (0.1, 15), (0.4, 10), (0.5, 8), (0.95, 1)])
def test_the_share_that_is_dropped_is_rounded_down(ratio, kept):
    prune, keys = settled(Prune(ratio=ratio), 16), jnp.asarray(normal(2, 2, 8, 16))
    chosen = prune.choose(keys, all_valid(keys), None)
    assert chosen["channels"].shape == (2, 2, kept)
    assert prune.matrix(chosen).shape == (2, 2, 16, kept)


def test_queries_count_and_without_them_the_keys_alone():
    """A channel with small keys is kept where the queries are large there."""
    keys = jnp.asarray(normal(1, 1, 64, 8) * 2 ** np.arange(8, dtype=np.float32))
    queries = jnp.asarray(normal(1, 32, 2, 8)).at[..., 0].mul(1000.0).at[:, :16].set(0.0)  # few came before
    prune = settled(Prune(ratio=0.5), 8)
    assert np.asarray(prune.choose(keys, all_valid(keys), None)["channels"])[0, 0].tolist() == [4, 5, 6, 7]
    assert np.asarray(prune.choose(keys, all_valid(keys), queries)["channels"])[0, 0].tolist() == [0, 5, 6, 7]


@pytest.mark.parametrize("transform", [Prune(ratio=0.5), Outliers(share=4)])
def test_slots_that_do_not_count_choose_nothing(transform):
    """NaN and huge numbers in them leave the choice as it is, and so does another row."""
    keys = normal(2, 2, 16, 8) * np.asarray([1, 2, 3, 4, 5, 6, 7, 8], np.float32)
    transform, valid = settled(transform, 8), np.arange(16) < 12
    clean = transform.choose(jnp.asarray(keys[:, :, :12]), jnp.ones((2, 12), bool), None)["channels"]
    keys[:, :, 12:14], keys[:, :, 14:, 0] = np.nan, 1e9
    mask = jnp.broadcast_to(jnp.asarray(valid), (2, 16))
    np.testing.assert_array_equal(transform.choose(jnp.asarray(keys), mask, None)["channels"], clean)
    keys[1] = np.nan
    np.testing.assert_array_equal(transform.choose(jnp.asarray(keys), mask, None)["channels"][0], clean[0])
    nothing = transform.choose(jnp.asarray(keys), jnp.zeros((2, 16), bool), None)["channels"]
    assert (np.asarray(nothing) >= 0).all()
    assert (np.asarray(nothing) < 8).all()


@pytest.mark.parametrize("size", [32, 48, 128])
def test_outliers_come_first(size):
    """The quarter of the channels with the largest squares, ascending, then the others; one is lost to none."""
    large = {0: [3, 5, 7, 20, 21, 22, 30, 31, 1, 2, 4, 6], 1: list(range(10, 22))}
    keys, count = normal(1, 2, 64, size), size // 4
    for head in (0, 1):
        keys[:, head][..., large[head][: min(count, 12)]] *= 30
    outliers = settled(Outliers(share=4), size)
    channels = np.asarray(outliers.choose(jnp.asarray(keys), all_valid(keys), None)["channels"])
    for head in (0, 1):
        first, others = channels[0, head, :count].tolist(), channels[0, head, count:].tolist()
        assert set(large[head][: min(count, 12)]) <= set(first)
        assert first == sorted(first)
        assert others == sorted(others)
        assert sorted(first + others) == list(range(size))


@pytest.mark.parametrize("size", [32, 48])
def test_outliers_are_rotated_apart(size):
    """The first quarter of the numbers is a rotation of the large channels, the rest one of the others."""
    keys, count = normal(1, 1, 64, size), size // 4
    large = list(range(1, 2 * count, 2))
    keys[..., large] *= 30
    outliers = settled(Outliers(share=4, seed=3), size)
    chosen = outliers.choose(jnp.asarray(keys), all_valid(keys), None)
    matrix = outliers.matrix(chosen)
    np.testing.assert_allclose(matrix[0, 0] @ matrix[0, 0].T, np.eye(size), rtol=0, atol=2e-6)
    numbers = forward(jnp.asarray(keys), matrix, heads=1)[0, 0]
    kinds = {32: ("hadamard", "dense"), 48: ("dense", "dense")}[size]  # widths 8 and 24, 12 and 36
    expected = keys[0, 0][:, large] @ rotation(kinds[0], count, 6).T
    np.testing.assert_allclose(numbers[:, :count], expected, rtol=0, atol=1e-4)
    others = [channel for channel in range(size) if channel not in large]
    expected = keys[0, 0][:, others] @ rotation(kinds[1], size - count, 7).T
    np.testing.assert_allclose(numbers[:, count:], expected, rtol=0, atol=1e-4)


def test_columns_that_pick_channels():
    picked = one_hot_columns(jnp.asarray([[[2, 0]]]), 3)
    np.testing.assert_array_equal(picked[0, 0], [[0, 1], [0, 0], [1, 0]])
