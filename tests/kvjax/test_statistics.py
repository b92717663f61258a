"""Running statistics against numpy over all tokens at once, and those of a model against its own projections."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.calibrate import observe_rows
from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope, YarnScaling, rotate, turns_at
from kvjax.statistics import Moments, empty_statistics, observe
from tests.tiny import tiny_model

ROPE = Rope(head_size=8, theta=100.0, scaling=YarnScaling(factor=4.0, original_max_positions=64))  # factor not 1
SHAPE = ModelShape(
    num_layers=1, num_query_heads=8, num_kv_heads=4, head_size=8, dtype="float32", vocab_size=64, rope=ROPE
)
BATCH, TOKENS = 2, 5

step = jax.jit(observe)


def call_at(seed, *, lengths=(TOKENS, TOKENS)):
    """One call's vectors before RoPE, queries with a mean and a spread of their own in each number, and positions."""
    generator = np.random.default_rng(seed)
    spread, mean = generator.uniform(0.5, 3, 8), generator.normal(size=8)
    queries, keys, values = (
        (generator.normal(size=(BATCH, TOKENS, heads, 8)) * spread + mean).astype(np.float32) for heads in (8, 4, 4)
    )
    offsets = np.arange(TOKENS, dtype=np.int32)[None]
    positions = np.where(offsets < np.asarray(lengths)[:, None], 10 * seed + offsets, -1).astype(np.int32)
    return {"queries": queries, "keys": keys, "values": values, "positions": positions}


def turned(call):
    """The call as attention sees it."""
    turns = turns_at(ROPE, jnp.asarray(call["positions"]))
    return {name: np.asarray(rotate(jnp.asarray(call[name]), turns)) for name in ("queries", "keys")}


def gather(calls, *, heads=1, padding=0.0):
    """Statistics of several calls; padded tokens hold `padding`."""
    (layer,) = empty_statistics(SHAPE, heads=heads)
    for call in calls:
        given = {**call, **turned(call)}
        empty = (call["positions"] < 0)[:, :, None, None]
        vectors = {name: jnp.asarray(np.where(empty, np.float32(padding), given[name])) for name in list(given)[:3]}
        layer = step(layer, vectors.pop("queries"), **vectors, positions=jnp.asarray(call["positions"]))
    return layer


def all_tokens(calls):
    """Tokens that count, of all calls together in float64: before RoPE, and as cached under `keys_rotated` etc."""
    found = {}
    for call in calls:
        rotated = {f"{name}_rotated": array for name, array in turned(call).items()}
        for name, array in {**call, **rotated}.items():
            found.setdefault(name, []).append(array[call["positions"] >= 0].astype(np.float64))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def close(ours, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=2e-6 * scale)


def moments_of(vectors, heads=1):
    joined = vectors.reshape(len(vectors), -1, heads * vectors.shape[2])
    return vectors.mean(axis=0), np.einsum("tkd,tke->kde", joined, joined) / len(vectors)


CALLS = [call_at(0), call_at(1, lengths=(TOKENS, 2)), call_at(2, lengths=(0, 3)), call_at(3)]


@functools.cache
def running(heads):
    return gather(CALLS, heads=heads)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_means_and_second_moments_run_over_calls_as_over_all_tokens_at_once(heads):
    """Keys as cached, keys from before RoPE (a scaled one, so that its factor counts) and values."""
    layer, tokens = running(heads), all_tokens(CALLS)
    assert float(layer.num_tokens) == len(tokens["values"]) == 30
    wanted = {"keys": "keys_rotated", "keys_before_rope": "keys", "values": "values"}
    for ours, theirs in wanted.items():
        mean, second = moments_of(tokens[theirs], heads)
        close(getattr(layer, ours).mean, mean)
        close(getattr(layer, ours).second, second)


def test_moments_of_queries():
    """Over the query heads of each key/value head after RoPE; means and lengths of the bands before it."""
    layer, tokens = running(1), all_tokens(CALLS)
    rotated = tokens["queries_rotated"].reshape(30, 4, 2, 8)
    close(layer.queries_second, np.einsum("tkgd,tkge->kde", rotated, rotated) / (30 * 2))
    plain = tokens["queries"]
    close(layer.queries.mean, plain.mean(axis=0))
    close(layer.queries_norm, np.hypot(plain[..., :4], plain[..., 4:]).mean(axis=0))


def weighted(tokens, second):
    """Second moments of values by w = k^T second k at mean 1, and the mean of w."""
    weights = np.einsum("tkd,kde,tke->tk", tokens["keys_rotated"], second, tokens["keys_rotated"])
    values = tokens["values"]
    sums = np.einsum("tk,tkd,tke->kde", weights, values, values)
    return sums / weights.sum(axis=0)[:, None, None], weights.mean(axis=0)


@pytest.mark.parametrize("num_calls", [1, 3])
def test_values_are_weighted_by_what_queries_make_of_their_keys(num_calls):
    """While the queries' moment stays the same: one call, or calls with the same rotated queries."""
    calls = [call_at(seed) for seed in range(num_calls)]
    (layer,) = empty_statistics(SHAPE)
    queries = turned(calls[0])["queries"]
    for call in calls:
        rest = {"keys": turned(call)["keys"], "values": call["values"], "positions": call["positions"]}
        layer = step(layer, jnp.asarray(queries), **jax.tree.map(jnp.asarray, rest))
    rows = queries.astype(np.float64).reshape(-1, 4, 2, 8)
    second, weight = weighted(all_tokens(calls), np.einsum("tkgd,tkge->kde", rows, rows) / (len(rows) * 2))
    close(layer.values_weighted_second, second)
    close(layer.value_weight, weight)


def test_padding_does_not_count():
    """Whatever lies at position -1 changes no bit, and a call of padding alone changes nothing."""
    other = gather(CALLS, padding=100.0)
    for ours, theirs in zip(jax.tree.leaves(running(1)), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    more = gather([*CALLS, call_at(5, lengths=(0, 0))])
    for ours, theirs in zip(jax.tree.leaves(running(1)), jax.tree.leaves(more), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fewer_heads_are_blocks_of_the_moments_of_many(heads, centred):
    """From four heads together: those of one, two and four neighbours, about the mean or about zero."""
    values = all_tokens(CALLS)["values"]
    joined = values.reshape(len(values), 4 // heads, heads * 8)
    vectors = joined - joined.mean(axis=0) * centred
    expected = np.einsum("tkd,tke->kde", vectors, vectors) / len(vectors)
    ours = running(4).values.second_of(heads, centred=centred)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(values).max() ** 2)


@pytest.mark.parametrize(("gathered", "heads"), [(1, 2), (2, 4), (4, 3)])
def test_moments_of_more_heads_than_were_gathered_name_the_flag(gathered, heads):
    moments = Moments(mean=np.zeros((4, 8)), second=np.zeros((4 // gathered, gathered * 8, gathered * 8)))
    with pytest.raises(UserError, match=rf"hold {gathered} key/value heads together.*--heads={heads}\."):
        moments.second_of(heads, centred=False)


def test_a_models_first_layer_against_its_projections():
    """The phase "calibrate" sees queries and keys after their norms, and takes keys back to before RoPE."""
    model = tiny_model()
    generator = np.random.default_rng(4)
    tokens = generator.integers(0, 64, (2, 24)).astype(np.int32)
    offsets = np.arange(24)[None]
    positions = np.where(offsets < np.asarray([[24], [13]]), offsets, -1).astype(np.int32)
    layers = observe_rows(model, empty_statistics(model.cache_shape), jnp.asarray(tokens), jnp.asarray(positions))
    block = model.layers[0]
    normed = block.attention_norm(jnp.take(model.embedding[...], jnp.asarray(tokens), axis=0))
    attention, counts = block.attention, positions >= 0
    queries = np.asarray(attention.query_norm(attention.query(normed)), np.float64)[counts]
    keys = np.asarray(attention.key_norm(attention.key(normed)), np.float64)[counts]
    values = np.asarray(attention.value(normed), np.float64)[counts]
    assert float(layers[0].num_tokens) == float(layers[1].num_tokens) == 37
    for ours, theirs in ((layers[0].keys_before_rope, keys), (layers[0].values, values)):
        mean, second = moments_of(theirs)
        close(ours.mean, mean)
        close(ours.second, second)
    close(layers[0].queries.mean, queries.mean(axis=0))
    assert np.abs(np.asarray(layers[0].keys.mean) - keys.mean(axis=0)).max() > 0.01  # rotated, they differ
