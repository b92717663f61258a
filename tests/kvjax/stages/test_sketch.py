"""The sign sketch of a residual: unbiased, and a poorer use of a bit than one more bit of levels."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.stages.codebook import distortion, lloyd_max
from kvjax.stages.levels import LloydMax
from kvjax.stages.sketch import Sketch
from tests.fitted import encoded, normal, product_errors

BITS = (1, 2, 3, 4)
# Variance per number of a product, as a multiple of the error of the levels with one bit fewer.
FACTOR = {"gaussian": np.pi / 2, "orthogonal": np.pi / 2 - 1}


def prod(bits, kind, seed=0):
    levels = LloydMax(bits=bits - 1, scale="raw") if bits > 1 else None
    return Sketch(levels=levels, gaussian=kind == "gaussian", seed=seed)


def error_of_levels(bits):
    return distortion(lloyd_max(bits, 128), 128) if bits else 1.0


@pytest.mark.parametrize("kind", FACTOR)
@pytest.mark.parametrize("bits", BITS)
def test_variance_of_products(bits, kind):
    """pi/2 times the error of the levels with a Gaussian S, pi/2 - 1 times with an orthogonal one."""
    across, _ = product_errors(prod(bits, kind))
    assert 128 * np.var(across) == pytest.approx(FACTOR[kind] * error_of_levels(bits - 1), rel=0.05)


@pytest.mark.parametrize("kind", FACTOR)
@pytest.mark.parametrize("bits", BITS)
def test_products_are_unbiased(bits, kind):
    """At cosine 1/2 the bias is a small part of what levels of as many bits have at the paper's scale."""
    across, along = product_errors(prod(bits, kind))
    bias = np.mean(along[:, None] / 2 + np.sqrt(0.75) * across)
    assert abs(bias) < 0.1 * error_of_levels(bits) / 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_more_bit_of_levels_is_better(bits):
    """Levels with all the bits, unbiased too, have a far smaller variance than either sketch."""
    across, _ = product_errors(LloydMax(bits=bits, scale="unbiased"))
    for kind, times in (("gaussian", 4), ("orthogonal", 1.5)):
        assert np.var(product_errors(prod(bits, kind))[0]) > times * np.var(across)


@pytest.mark.parametrize("kind", FACTOR)
@pytest.mark.parametrize("bits", [1, 3])
def test_an_expanded_query_meets_what_is_stored(bits, kind):
    """q' . stored = q . x~, and sums of what is stored collapse to sums of x~."""
    quantiser = prod(bits, kind)
    numbers, query = jnp.asarray(normal(1, 1, 8, 32)), jnp.asarray(normal(3, 32, seed=1))
    _, read = encoded(quantiser, numbers)
    restored = quantiser.collapse(read)
    assert restored.shape == numbers.shape
    products = np.einsum("qr,sr->qs", quantiser.expand_queries(query), read[0, 0])
    np.testing.assert_allclose(products, np.einsum("qd,sd->qs", query, restored[0, 0]), rtol=0, atol=2e-4)
    weights = normal(8, seed=2)
    summed = quantiser.collapse(jnp.einsum("s,bksr->bkr", weights, read))
    np.testing.assert_allclose(summed, np.einsum("s,bksr->bkr", weights, restored), rtol=0, atol=2e-4)


def test_projections():
    for kind, seed in (("gaussian", 0), ("orthogonal", 1)):
        rows = prod(2, kind, seed).projection(128)
        np.testing.assert_array_equal(rows, prod(2, kind, seed).projection(128))
        assert np.mean(np.sum(rows**2, axis=1)) == pytest.approx(128, rel=0.05)
    square = prod(2, "orthogonal").projection(64)
    np.testing.assert_allclose(square @ square.T, 64 * np.eye(64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [1, 2])
def test_zero_vectors_stay_zero(bits):
    numbers = jnp.asarray(normal(1, 1, 8, 32)).at[0, 0, 5].set(0.0)
    quantiser = prod(bits, "gaussian")
    restored = np.asarray(quantiser.collapse(encoded(quantiser, numbers)[1]))[0, 0]
    assert np.isfinite(restored).all()
    np.testing.assert_array_equal(restored[5], 0)
