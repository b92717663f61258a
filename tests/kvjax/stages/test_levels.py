"""Nearest levels of a table at a scale a token: codes, errors and products as theory and golden numbers have them."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from kvjax._kernels import unpack
from kvjax.stages.codebook import distortion, lloyd_max, normal_float, uniform_step
from kvjax.stages.levels import Levels, LloydMax, half_integer_levels
from tests.fitted import encoded, normal, product_errors, relative_error, through, unit_vectors

SPHERE = {64: [0.358387, 0.114526, 0.033391, 0.009132], 128: [0.360889, 0.116000, 0.033966, 0.009315]}
SPHERE[256] = [0.362136, 0.116740, 0.034256, 0.009408]
MEASURED = {  # relative error at d = 128, 1 to 4 bits
    "raw": [0.361, 0.1160, 0.0340, 0.00934],
    "norm": [0.401, 0.1188, 0.0338, 0.00920],
    "unbiased": [0.567, 0.1305, 0.0347, 0.00927],
}
RULES = ("raw", "norm", "unbiased", "largest")


def golden_vector():
    """x_i = sin(0.7 i^2 + 0.3) + 0.25, rotated by a Hadamard matrix with signs from a hash; of length 1."""
    index = np.arange(128)
    plain = np.sin(0.7 * index**2 + 0.3) + 0.25
    signs = np.where((index * 2654435761 % (1 << 32)) >> 16 & 1, -1, 1)
    np.testing.assert_array_equal(signs[:8], [1, -1, 1, 1, -1, -1, 1, 1])
    assert np.linalg.norm(plain) == pytest.approx(8.4797876, abs=5e-8)
    rotated = linalg.hadamard(128) @ (signs * plain) / np.linalg.norm(plain) / np.sqrt(128)
    np.testing.assert_allclose(rotated[:4], [0.085808, -0.010499, -0.147510, -0.110105], rtol=0, atol=6e-7)
    return rotated


GOLDEN = {  # first codes, their sum, |c|^2, relative error, norm-keeping and unbiased scales
    2: ([2, 1, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 2, 2, 0, 3], 202, 0.870091, 0.125261, 1.07206, 1.14624),
    3: ([5, 3, 1, 1, 2, 3, 5, 4, 5, 5, 4, 6, 4, 5, 1, 7], 463, 0.963881, 0.036332, 1.01856, 1.03759),
    4: ([11, 7, 2, 3, 4, 6, 10, 8, 11, 10, 8, 12, 8, 10, 3, 14], 988, 0.944350, 0.011042, 1.02904, 1.03450),
}


@pytest.mark.parametrize("bits", GOLDEN)
@pytest.mark.parametrize("length", [1.0, 8.4797876])
def test_golden_vector(bits, length):
    """Codes and scales of a vector that other programs quantised too, whatever its length."""
    first, total, square, error, norm, unbiased = GOLDEN[bits]
    vector = jnp.asarray(golden_vector() * length, jnp.float32)
    tokens = jnp.broadcast_to(vector, (1, 1, 8, 128))
    kept = {rule: encoded(Levels(levels=lloyd_max(bits), scale=rule), tokens) for rule in RULES[:3]}
    parts = {rule: part for rule, ((part,), _) in kept.items()}
    codes = np.asarray(unpack(parts["raw"].planes, bits))[0, 0, 0].astype(int) + (1 << bits) // 2
    np.testing.assert_array_equal(codes[:16], first)
    assert codes.sum() == total
    levels = np.asarray(lloyd_max(bits))[codes] / np.sqrt(128)
    assert np.sum(levels**2) == pytest.approx(square, abs=1e-6)
    scales = {rule: float(part.scale[0, 0, 0]) * np.sqrt(128) / length for rule, part in parts.items()}
    assert scales == pytest.approx({"raw": 1.0, "norm": norm, "unbiased": unbiased}, rel=2**-11)  # float16
    assert relative_error(vector, kept["raw"][1][0, 0, 0]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("size", SPHERE)
def test_distortion_of_random_vectors(size):
    """With the vector's own length as scale, the error is what the levels were made for."""
    vectors = unit_vectors(4000, size)
    errors = [relative_error(vectors, through(LloydMax(bits=bits, scale="raw"), vectors)) for bits in (1, 2, 3, 4)]
    np.testing.assert_allclose(errors, SPHERE[size], rtol=0.01)
    np.testing.assert_allclose(errors, [distortion(lloyd_max(bits, size), size) for bits in (1, 2, 3, 4)], rtol=0.01)


def test_levels_of_the_normal_reach_its_distortion_in_long_vectors():
    vectors = normal(256, 4096)
    levels = [LloydMax(bits=bits, source="normal", scale="raw") for bits in (1, 2, 3, 4)]
    errors = [relative_error(vectors, through(quantiser, vectors)) for quantiser in levels]
    np.testing.assert_allclose(errors, [0.3633802, 0.1174818, 0.0345478, 0.0095010], rtol=0.01)


@pytest.mark.parametrize("rule", MEASURED)
def test_distortion_of_each_scale(rule):
    vectors = unit_vectors(4000, 128)
    errors = [relative_error(vectors, through(LloydMax(bits=bits, scale=rule), vectors)) for bits in (1, 2, 3, 4)]
    np.testing.assert_allclose(errors, MEASURED[rule], rtol=0.02)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_inner_products_of_each_scale(bits):
    """Bias and variance per number at cosines 1/2 and 0, by the formulas that the distortion D gives.

    raw: bias -D c, variance D(1 - D)/(d - 1); norm: sqrt(1 - D) - 1 and D; unbiased: 0 and D/(1 - D).
    """
    loss = SPHERE[128][bits - 1]
    bias = {"raw": -loss / 2, "norm": (np.sqrt(1 - loss) - 1) / 2, "unbiased": 0.0}
    variance = {"raw": loss * (1 - loss), "norm": loss, "unbiased": loss / (1 - loss)}
    for rule, expected in bias.items():
        across, along = product_errors(LloydMax(bits=bits, scale=rule))
        at_half = along[:, None] / 2 + np.sqrt(0.75) * across
        assert np.mean(at_half) == pytest.approx(expected, rel=0.05, abs=0.01 * loss), rule
        assert np.var(across) * 127 == pytest.approx(variance[rule], rel=0.05), rule


def test_the_norm_is_kept_or_the_product_with_itself():
    """Scale by scale: |x^| = |x| for "norm", <x, x^> = |x|^2 for "unbiased", up to a float16's rounding."""
    vectors = 37 * unit_vectors(4000, 128)
    for bits in (1, 2, 4):
        norms = np.linalg.norm(through(LloydMax(bits=bits, scale="norm"), vectors), axis=1)
        np.testing.assert_allclose(norms, 37, rtol=2**-11)
        products = np.sum(through(LloydMax(bits=bits, scale="unbiased"), vectors) * vectors, axis=1)
        np.testing.assert_allclose(products, 37**2, rtol=2**-11)


@pytest.mark.parametrize("bits", [2, 5])
def test_normal_float_takes_the_nearest_level_at_the_largest_size(bits):
    levels, vectors = np.asarray(normal_float(bits)), normal(16, 64)
    scale = np.abs(vectors).max(axis=1, keepdims=True)
    nearest = levels[np.abs(vectors[..., None] / scale[..., None] - levels).argmin(axis=-1)]
    ours = through(Levels(levels=normal_float(bits), scale="largest"), vectors)
    np.testing.assert_allclose(ours, nearest * scale.astype(np.float16), rtol=0, atol=1e-6 * scale.max())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_half_integers_are_kept_as_codes(bits):
    """Levels (i + 1/2) step as integers that need no table, with the uniform quantiser's error."""
    vectors = normal(4000, 128)
    quantiser = half_integer_levels(bits, uniform_step(bits))
    part = quantiser.encode(jnp.asarray(vectors[:8])[None, None])[0]
    assert (part.levels, part.shift, part.bits) == (None, 0.5, bits)
    by_table = through(Levels(levels=quantiser.levels, scale="norm"), vectors[:8])
    np.testing.assert_allclose(through(quantiser, vectors[:8]), by_table, rtol=2**-9)
    loss = distortion(quantiser.levels, 128)
    kept = relative_error(vectors, through(quantiser, vectors))
    assert kept == pytest.approx(2 - 2 * np.sqrt(1 - loss), rel=0.03)  # the length is kept


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [1, 3])
def test_zero_vectors_stay_zero(rule, bits):
    vectors = normal(16, 32)
    vectors[3] = 0
    kept = through(Levels(levels=lloyd_max(bits), scale=rule), vectors)
    assert np.isfinite(kept).all()
    np.testing.assert_array_equal(kept[3], 0)
    assert (np.abs(np.delete(kept, 3, axis=0)).max(axis=1) > 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_lengths_beyond_what_a_scale_can_hold_stay_finite(rule):
    kept = through(Levels(levels=lloyd_max(2), scale=rule), 1e7 * normal(8, 32))
    assert np.isfinite(kept).all()
