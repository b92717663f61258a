"""What queries to come will attend to, against a softmax of each query in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.causal import causal_attention
from kvjax.foresight import BLOCK, LayerFuture, foresee_layer
from kvjax.sharding import Placement
from models.layers import PHASES
from tests.tiny import tiny_model
from tests.views import softmax

LENGTHS = (48, 37)


def future_of(queries, keys, lengths):
    """`B J K T`: each query's softmax over the keys up to its own, and the largest of a block's and all later ones."""
    batch, num_tokens, heads, size = queries.shape
    kv_heads = keys.shape[2]
    weights = np.zeros((batch, num_tokens, kv_heads, num_tokens))  # of a query, the largest over its group
    for row, length in enumerate(lengths):
        for place, head in np.ndindex(length, heads):
            own = head * kv_heads // heads
            logits = keys[row, : place + 1, own].astype(np.float64) @ queries[row, place, head] / np.sqrt(size)
            seen = weights[row, place, own, : place + 1]
            np.maximum(seen, softmax(logits), out=seen)
    return np.stack([weights[:, start:].max(axis=1) for start in range(0, num_tokens, BLOCK)], axis=1)


def positions_of(lengths, num_tokens):
    offsets = np.arange(num_tokens, dtype=np.int32)[None]
    return np.where(offsets < np.asarray(lengths)[:, None], offsets, -1).astype(np.int32)


@pytest.fixture(scope="module")
def layer():
    """Two rows of random queries, keys and values, one shorter; the layer's output and future."""
    random = np.random.default_rng(0)
    shapes = {"queries": (2, 48, 4, 16), "keys": (2, 48, 2, 16), "values": (2, 48, 2, 16)}
    arrays = {name: random.normal(size=shape).astype(np.float32) * 2 for name, shape in shapes.items()}
    arrays["positions"] = positions_of(LENGTHS, 48)
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    queries = given.pop("queries")

    @jax.jit
    def run(queries, given):
        more = {"output": jnp.zeros((4, 16, 8)), "placement": Placement()}
        return foresee_layer(LayerFuture(), queries, **given, **more)

    output, future = run(queries, given)
    return arrays, np.asarray(output), np.asarray(future.future)


def test_the_future_is_the_largest_weight_of_a_block_and_of_all_later_ones(layer):
    arrays, _, future = layer
    assert (future.shape, future.dtype) == ((2, 3, 2, 48), np.float32)
    expected = future_of(arrays["queries"], arrays["keys"], LENGTHS)
    np.testing.assert_allclose(future, expected, rtol=0, atol=1e-6)


def test_what_is_to_come_dwindles_and_padding_is_worth_nothing(layer):
    _, _, future = layer
    assert (future[:, 1:] <= future[:, :-1]).all()
    assert (future[1, :, :, 37:] == 0).all()
    own = [future[0, block, :, BLOCK * block : BLOCK * (block + 1)] for block in range(3)]
    assert np.min(own) > 0  # a token attends to itself
    assert (future[0, 2] < future[0, 0]).any()


def test_attention_itself_is_the_plain_causal_pass(layer):
    arrays, output, _ = layer
    given = {name: jnp.asarray(array) for name, array in arrays.items()}
    expected = causal_attention(given.pop("queries"), given.pop("keys"), **given)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(output[row, :length], np.asarray(expected)[row, :length], rtol=0, atol=1e-5)


def test_a_model_foresees_what_its_own_queries_and_keys_give(monkeypatch):
    """Both layers of a model; the activations are those of a pass without a cache."""
    model, found = tiny_model(), []
    tokens = np.random.default_rng(1).integers(0, 64, (2, 32)).astype(np.int32)
    lengths = (32, 21)

    def listen(layer, queries, *, keys, values, positions, output, placement):
        del output, placement
        found.append((np.asarray(queries), np.asarray(keys)))
        return causal_attention(queries, keys, values=values, positions=positions), layer

    monkeypatch.setitem(PHASES, "listen", listen)
    given = jnp.asarray(tokens), jnp.asarray(positions_of(lengths, 32))
    hidden, _ = model(given[0], positions=given[1], layers=None, phase="listen")
    empty = (LayerFuture(), LayerFuture())
    run = jax.jit(lambda tokens, positions: model(tokens, positions=positions, layers=empty, phase="foresee"))
    foreseen, layers = run(*given)
    assert len(layers) == len(found) == 2
    for layer, (queries, keys) in zip(layers, found, strict=True):
        np.testing.assert_allclose(layer.future, future_of(queries, keys, lengths), rtol=0, atol=1e-4)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(foreseen[row, :length], np.asarray(hidden)[row, :length], rtol=0, atol=1e-3)
