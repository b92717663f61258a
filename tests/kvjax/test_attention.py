"""Attention without a cache, over an empty one and over a filled one: one formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.attention import causal_attention, decode_layer, prefill_layer
from kvjax.cache import empty_cache
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.sharding import Placement


def new_tokens(num_tokens, *, batch=2, query_heads=4, kv_heads=2, head_size=16):
    generator = np.random.default_rng(num_tokens)

    def normal(heads):
        return jnp.asarray(generator.normal(size=(batch, num_tokens, heads, head_size)), jnp.float32)

    return normal(query_heads), normal(kv_heads), normal(kv_heads)


def all_positions(num_tokens, batch=2):
    return jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))


@pytest.mark.parametrize("num_tokens", [1, 255, 256, 257, 1024, 1025, 1500])
def test_causal_attention_equals_dot_product_attention(num_tokens):
    queries, keys, values = new_tokens(num_tokens)
    ours = causal_attention(queries, keys, values=values, positions=all_positions(num_tokens))
    witness = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
    np.testing.assert_allclose(ours, witness, rtol=0, atol=3e-6)


@pytest.mark.parametrize("num_tokens", [300, 1200])
def test_padding_is_seen_by_nobody(num_tokens):
    """NaN-free garbage on the right of a short row changes none of its real tokens."""
    queries, keys, values = new_tokens(num_tokens)
    positions = jnp.where(
        jnp.arange(num_tokens)[None] < jnp.asarray([[num_tokens], [40]]), all_positions(num_tokens), -1
    )
    ours = causal_attention(queries, keys, values=values, positions=positions)
    short = causal_attention(
        queries[1:, :40], keys[1:, :40], values=values[1:, :40], positions=all_positions(40, batch=1)
    )
    np.testing.assert_allclose(ours[1, :40], short[0], rtol=0, atol=3e-6)
    assert np.isfinite(ours).all()


def test_prefill_then_decode_equals_causal_attention():
    queries, keys, values = new_tokens(20)
    positions = all_positions(20)
    whole = causal_attention(queries, keys, values=values, positions=positions)
    shape = ModelShape(num_layers=1, num_query_heads=4, num_kv_heads=2, head_size=16, dtype="float32", vocab_size=64)
    layer = empty_cache(shape, policy=Policy(), batch=2, max_tokens=20).layers[0]
    rest = {"positions": positions, "placement": Placement()}
    first, layer = prefill_layer(
        layer, queries[:, :12], keys=keys[:, :12], values=values[:, :12], **{**rest, "positions": positions[:, :12]}
    )
    second, layer = decode_layer(
        layer, queries[:, 12:], keys=keys[:, 12:], values=values[:, 12:], **{**rest, "positions": positions[:, 12:]}
    )
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=0, atol=3e-6)
    np.testing.assert_array_equal(layer.exact.positions, positions)
    np.testing.assert_array_equal(layer.exact.keys, jnp.swapaxes(keys, 1, 2))


def test_gradients_exist_up_to_the_context_of_training():
    queries, keys, values = new_tokens(600)

    def loss(attention, queries):
        return jnp.sum(attention(queries) ** 2)

    def ours(queries):
        return causal_attention(queries, keys, values=values, positions=all_positions(600))

    def witness(queries):
        return jax.nn.dot_product_attention(queries, keys, values, is_causal=True)

    one, other = (jax.grad(loss, argnums=1)(attention, queries) for attention in (ours, witness))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
