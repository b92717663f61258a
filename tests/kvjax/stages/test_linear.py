"""Transforms by a matrix: what queries and outputs need follows from it, for shared, per-head and per-row matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.stages.facts import LayerFacts
from kvjax.stages.linear import Rotation, backward, forward, rotation, transform_queries
from kvjax.stages.rotation import dense_rotation, hadamard_rotation
from tests.fitted import normal, shape_of

B, K, N, T, S, D = 2, 4, 8, 3, 5, 16
LEADING = {"shared": (), "head": (K,), "row": (B, K)}


def orthonormal(kind, rank=D, heads=1):
    """A of each kind with orthonormal columns, those of `heads` neighbouring heads taken together."""
    leading = LEADING[kind]
    blocks = (*leading[:-1], leading[-1] // heads) if leading else ()
    columns = np.linalg.qr(normal(*blocks, heads * D, rank, seed=3))[0]
    return columns.reshape(*leading, D, rank).astype(np.float32)


def products(queries, vectors):
    """q . x for each query head with its key/value head, `B N T S`."""
    wide = np.repeat(np.asarray(vectors), N // vectors.shape[1], axis=1)
    return np.einsum("btnr,bnsr->bnts", queries, wide)


@pytest.mark.parametrize("kind", LEADING)
@pytest.mark.parametrize("given_by", [np.asarray, jnp.asarray])
def test_orthogonal_transforms_leave_products_as_they_are(kind, given_by):
    """q . x = (q A) . (x A), and x A A^T = x."""
    matrix = given_by(orthonormal(kind))
    queries, vectors = jnp.asarray(normal(B, T, N, D)), jnp.asarray(normal(B, K, S, D, seed=1))
    turned = forward(vectors, matrix, heads=1)
    assert not np.allclose(turned, vectors, atol=0.1)
    met = transform_queries(queries, matrix, num_kv_heads=K)
    np.testing.assert_allclose(products(met, turned), products(queries, vectors), rtol=0, atol=1e-5)
    np.testing.assert_allclose(backward(turned, matrix, heads=1), vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", LEADING)
def test_forward_is_a_product_for_each_head(kind):
    """Against loops, with fewer columns than rows."""
    matrix, vectors = orthonormal(kind, rank=6), normal(B, K, S, D)
    ours = np.asarray(forward(jnp.asarray(vectors), matrix, heads=1))
    back = np.asarray(backward(jnp.asarray(ours), matrix, heads=1))
    for b, k in np.ndindex(B, K):
        own = matrix[(b, k)[-len(LEADING[kind]) :]] if LEADING[kind] else matrix
        np.testing.assert_allclose(ours[b, k], vectors[b, k] @ own, rtol=0, atol=1e-5)
        np.testing.assert_allclose(back[b, k], vectors[b, k] @ own @ own.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["head", "row"])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_neighbouring_heads_share_numbers(kind, heads):
    """R numbers of `heads` heads together: y = sum_k x_k A_k, and each head's A_k turns them back to its own x_k."""
    matrix, vectors = orthonormal(kind, rank=6, heads=heads), normal(B, K, S, D)
    ours = forward(jnp.asarray(vectors), matrix, heads=heads)
    assert ours.shape == (B, K // heads, S, 6)
    wide = np.broadcast_to(matrix, (B, K, D, 6)).reshape(B, K // heads, heads * D, 6)
    joined = vectors.reshape(B, K // heads, heads, S, D).swapaxes(2, 3).reshape(B, K // heads, S, heads * D)
    np.testing.assert_allclose(ours, joined @ wide, rtol=0, atol=1e-5)
    kept = (joined @ wide @ wide.swapaxes(2, 3)).reshape(B, K // heads, S, heads, D).swapaxes(2, 3)
    back = backward(ours, matrix, heads=heads)
    np.testing.assert_allclose(back, kept.reshape(B, K, S, D), rtol=0, atol=1e-5)
    queries = jnp.asarray(normal(B, T, N, D, seed=2))
    met = transform_queries(queries, matrix, num_kv_heads=K)
    np.testing.assert_allclose(products(met, ours), products(queries, back), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", LEADING)
def test_outputs_are_turned_back_once(kind):
    """sum w x = (sum w y) A^T for each query head."""
    matrix, vectors = orthonormal(kind, rank=6), jnp.asarray(normal(B, K, S, D))
    weights = np.abs(normal(B, N, T, S, seed=4))
    numbers = forward(vectors, matrix, heads=1)

    def summed(stored):
        return jnp.asarray(np.einsum("bnts,bnsr->btnr", weights, np.repeat(np.asarray(stored), N // K, axis=1)))

    ours = transform_queries(summed(numbers), matrix, transposed=True, num_kv_heads=K)
    np.testing.assert_allclose(ours, summed(backward(numbers, matrix, heads=1)), rtol=0, atol=2e-5)


def test_queries_in_low_precision_are_transformed_in_float32():
    queries = jnp.asarray(normal(B, T, N, D), jnp.bfloat16)
    ours = transform_queries(queries, orthonormal("head"), num_kv_heads=K)
    assert ours.dtype == jnp.float32
    wide = transform_queries(queries.astype(jnp.float32), orthonormal("head"), num_kv_heads=K)
    np.testing.assert_array_equal(ours, wide)


def settled(layer, role, *, kind="hadamard", seed=0, head_size=64):
    facts = LayerFacts(shape=shape_of(head_size=head_size), layer=layer, role=role)
    return Rotation(kind=kind, seed=seed).fit(facts)[0].matrix({})


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
def test_each_layer_and_role_has_a_rotation_of_its_own(kind):
    found = [
        settled(layer, role, kind=kind, seed=seed) for layer in (0, 1) for role in ("keys", "values") for seed in (0, 1)
    ]
    for index, one in enumerate(found):
        np.testing.assert_allclose(one @ one.T, np.eye(64), rtol=0, atol=2e-6)
        assert all(np.abs(one - other).max() > 0.1 for other in found[:index])
    np.testing.assert_array_equal(settled(0, "keys", kind=kind), found[0])


def test_rotations_by_kind():
    np.testing.assert_array_equal(rotation("hadamard", 32, 5), hadamard_rotation(32, 5))
    np.testing.assert_array_equal(rotation("dense", 32, 5), dense_rotation(32, 5))


def test_hadamard_matrices_need_a_power_of_two():
    with pytest.raises(UserError, match=r"power of two, and the model's is 80: use rotation=dense\."):
        settled(0, "keys", head_size=80)
    assert settled(0, "keys", kind="dense", head_size=80).shape == (80, 80)
