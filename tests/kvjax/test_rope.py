"""Rotation: relative, exact far out, inverse, and the scaled frequencies against loops from the papers' formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.rope import Llama3Scaling, Rope, YarnScaling, rotate, turns_at


def rotated(rope, heads, position):
    return np.asarray(rotate(jnp.asarray(heads, jnp.float32), turns_at(rope, jnp.asarray([[position]]))))[0, 0, 0]


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    return generator.normal(size=(2, 1, 1, 1, 64))


def test_scores_depend_on_the_distance_alone(pair):
    rope = Rope(head_size=64)
    near = rotated(rope, pair[0], 17) @ rotated(rope, pair[1], 5)
    far = rotated(rope, pair[0], 1017) @ rotated(rope, pair[1], 1005)
    assert near == pytest.approx(far, rel=1e-3)


@pytest.mark.parametrize("position", [0, 1, 999, 200_000])
def test_rotation_is_a_complex_product(pair, position):
    """Against float64; at position 200,000 float32 phases are still good to about 1e-2 in the fastest band."""
    rope = Rope(head_size=64, theta=1e6)
    values = pair[0].reshape(64)
    bands = values[:32] + 1j * values[32:]
    frequencies = 1e6 ** -(np.arange(0, 64, 2) / 64)
    turned = bands * np.exp(1j * position * frequencies)
    expected = np.concatenate([turned.real, turned.imag])
    np.testing.assert_allclose(rotated(rope, pair[0], position), expected, atol=max(1e-5, position * 2e-7))


def test_low_precision_heads_turn_in_float32(pair):
    rope = Rope(head_size=64)
    heads = jnp.asarray(pair[0], jnp.bfloat16)
    turned = rotate(heads, turns_at(rope, jnp.asarray([[150_000]])))
    assert turned.dtype == jnp.bfloat16
    exact = rotated(rope, heads.astype(jnp.float32), 150_000)
    np.testing.assert_allclose(np.asarray(turned, np.float32)[0, 0, 0], exact, atol=2**-7)


def test_llama3_frequencies():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    rope = Rope(head_size=128, theta=5e5, scaling=scaling)
    for ours, plain in zip(rope.frequencies(), Rope(head_size=128, theta=5e5).frequencies(), strict=True):
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192 / 1:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert ours == pytest.approx(expected, rel=1e-5)
    assert rope.attention_factor() == 1.0


def test_yarn_leaves_fast_bands_and_interpolates_slow_ones():
    scaling = YarnScaling(factor=4.0, original_max_positions=32768)
    plain, ours = (Rope(head_size=128, theta=1e6, scaling=kind).frequencies() for kind in (None, scaling))
    turns = 32768 * plain / (2 * math.pi)
    np.testing.assert_allclose(ours[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(ours[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert (np.diff(ours) < 0).all()
    assert Rope(head_size=128, scaling=scaling).attention_factor() == pytest.approx(0.1 * math.log(4) + 1)


def test_yarn_attention_factors():
    def factor(**changes):
        return YarnScaling(original_max_positions=64, **{"factor": 40.0, **changes}).attention_factor()

    assert factor(given_attention_factor=0.7) == 0.7
    assert factor(mscale=1.0, mscale_all_dim=1.0) == 1.0
    assert factor(factor=1.0) == 1.0
    assert factor(mscale=1.0, mscale_all_dim=0.5) == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))
