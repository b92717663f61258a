"""Attention over an empty cache and over a filled one: the formula of attention without one."""

import jax.numpy as jnp
import numpy as np

from kvjax.attention import decode_layer, prefill_layer
from kvjax.causal import causal_attention
from kvjax.empty import empty_cache
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


def test_prefill_then_decode_equals_causal_attention():
    queries, keys, values = new_tokens(20)
    positions = all_positions(20)
    whole = causal_attention(queries, keys, values=values, positions=positions)
    shape = ModelShape(num_layers=1, num_query_heads=4, num_kv_heads=2, head_size=16, dtype="float32", vocab_size=64)
    layer = empty_cache(shape, policy=Policy(), batch=2, max_tokens=20).layers[0]
    rest = {"placement": Placement(), "output": jnp.zeros((4, 16, 8))}
    first, layer = prefill_layer(
        layer, queries[:, :12], keys=keys[:, :12], values=values[:, :12], positions=positions[:, :12], **rest
    )
    second, layer = decode_layer(
        layer, queries[:, 12:], keys=keys[:, 12:], values=values[:, 12:], positions=positions[:, 12:], **rest
    )
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=0, atol=3e-6)
    np.testing.assert_array_equal(layer.exact.positions, positions)
    np.testing.assert_array_equal(layer.exact.keys, jnp.swapaxes(keys, 1, 2))
