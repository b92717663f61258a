"""Attention of tokens among themselves, and what each token is given, against the whole matrix of probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.causal import add_mass, attention_with_mass, causal_attention

MASSES = ("sum", "peak", "low")


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


@functools.partial(jax.jit, static_argnames="mass")
def with_mass(queries, keys, values, positions, mass):
    return attention_with_mass(queries, keys, values=values, positions=positions, mass=mass)


def masses_of(queries, keys, positions):
    """Masses from all probabilities in float64: name -> B K T."""
    queries, keys, positions = (np.asarray(array) for array in (queries, keys, positions))
    grouped = queries.astype(np.float64).reshape(*queries.shape[:2], keys.shape[2], -1, queries.shape[3])
    scores = np.einsum("BTKGD,BSKD->BKGTS", grouped, keys.astype(np.float64)) / np.sqrt(queries.shape[3])
    seen = (positions[:, None] >= 0) & (positions[:, None] <= positions[:, :, None])  # B T S
    mask = seen[:, None, None]
    weights = np.where(mask, np.exp(scores), 0.0)
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    low = mask & (shares < 1 / np.maximum(seen.sum(-1), 1)[:, None, None, :, None])
    return {"sum": shares.sum(3).mean(2), "peak": shares.max((2, 3)), "low": low.sum(3).mean(2)}


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("num_tokens", [5, 300, 1100])
def test_masses_are_those_of_the_whole_matrix(num_tokens, mass):
    """Also of a row that is padded to the right; and attention is what it is without them."""
    queries, keys, values = new_tokens(num_tokens)
    lengths = jnp.asarray([[num_tokens], [num_tokens * 3 // 5]])
    positions = jnp.where(jnp.arange(num_tokens)[None] < lengths, all_positions(num_tokens), -1)
    output, masses = with_mass(queries * 2, keys, values, positions, mass)
    expected = masses_of(queries * 2, keys, positions)[mass]
    np.testing.assert_allclose(masses, expected, rtol=3e-5, atol=1e-6)
    assert not np.asarray(masses)[1, :, num_tokens * 3 // 5 :].any()
    plain = causal_attention(queries * 2, keys, values=values, positions=positions)
    real = np.asarray(positions >= 0)
    np.testing.assert_allclose(np.asarray(output)[real], np.asarray(plain)[real], rtol=0, atol=3e-6)
    assert np.isfinite(output).all()


def test_masses_of_earlier_and_later_queries_together():
    old, new = jnp.asarray([[[1.0, 0.5]]]), jnp.asarray([[[0.25, 2.0]]])
    for mass, expected in (("sum", [1.25, 2.5]), ("low", [1.25, 2.5]), ("peak", [1.0, 2.0])):
        np.testing.assert_array_equal(add_mass(mass, old, new)[0, 0], expected)


@pytest.mark.optimised
@pytest.mark.parametrize("mass", [None, *MASSES])
def test_no_matrix_of_all_tokens_by_all_tokens(mass):
    """Compiled for 8,192 tokens, the memory beside arguments and results is a small part of such a matrix."""
    num_tokens, query_heads = 8192, 2
    queries, keys = (jax.ShapeDtypeStruct((1, num_tokens, heads, 128), jnp.float32) for heads in (query_heads, 1))
    positions = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

    def plain(queries, keys, values, positions):
        return causal_attention(queries, keys, values=values, positions=positions)

    if mass is None:
        lowered = jax.jit(plain).lower(queries, keys, keys, positions)
    else:
        lowered = with_mass.lower(queries, keys, keys, positions, mass=mass)
    used = lowered.compile().memory_analysis().temp_size_in_bytes
    matrix = query_heads * num_tokens**2 * 4
    assert 0 < used < matrix / 6
