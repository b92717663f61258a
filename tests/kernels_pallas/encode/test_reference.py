"""Codes and scales by the formulas, in NumPy; errors of whole codecs are tested with the stages."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import unpack
from kernels_pallas.encode.cases import RULES
from kernels_pallas.encode.reference import (
    Integers,
    Table,
    divide,
    encode,
    encode_token,
    inverse,
    nearest,
    read_scale,
    thresholds,
    to_scale,
    transform,
)

UNEVEN = (-1.0, -0.4, 0.0, 0.7)  # as NormalFloat's, not mirrored


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("levels", [RULES["table3"].levels, RULES["table4"].levels, UNEVEN, (-0.8, 0.8)])
def test_the_nearest_level(levels):
    unit = drawn(50, 40)
    codes, found = nearest(jnp.asarray(unit), Table(levels=levels))
    expected = np.abs(unit[..., None].astype(np.float64) - np.asarray(levels)).argmin(axis=-1)
    np.testing.assert_array_equal(codes + len(levels) // 2, expected)
    np.testing.assert_allclose(found, np.asarray(levels)[expected], rtol=1e-6)


@pytest.mark.parametrize("name", ["half2", "half4"])
def test_half_integers_are_found_without_a_table(name):
    rule, unit = RULES[name], drawn(50, 40)
    codes, found = nearest(jnp.asarray(unit), rule)
    by_table = nearest(jnp.asarray(unit), Table(levels=rule.levels))
    np.testing.assert_array_equal(codes, by_table[0])
    np.testing.assert_allclose(found, by_table[1], rtol=1e-6)


@pytest.mark.parametrize("rule", ["raw", "norm", "unbiased", "largest"])
def test_scales_by_their_formulas(rule):
    levels, numbers = np.asarray(UNEVEN), drawn(30, 24).astype(np.float64)
    codes, scale, offset = encode_token(jnp.asarray(numbers, jnp.float32), Table(levels=UNEVEN, scale=rule))
    length, root = np.linalg.norm(numbers, axis=1, keepdims=True), np.sqrt(24)
    largest = np.abs(numbers).max(axis=1, keepdims=True)
    unit = numbers / largest if rule == "largest" else numbers * root / length
    nearest_levels = levels[np.asarray(codes) + 2]
    expected = {
        "raw": length / root,
        "norm": length / np.linalg.norm(nearest_levels, axis=1, keepdims=True),
        "unbiased": length * root / np.sum(unit * nearest_levels, axis=1, keepdims=True),
        "largest": largest,
    }
    assert offset is None
    np.testing.assert_allclose(scale, expected[rule], rtol=1e-5)


def test_symmetric_integers_are_rounded_by_the_scale_that_is_stored():
    numbers = drawn(1, 2, 16, 32)
    part = encode(jnp.asarray(numbers), Integers(bits=8, symmetric=True))
    scale = (np.abs(numbers).max(axis=-1) / np.float32(127)).astype(np.float16)
    np.testing.assert_array_equal(part.scale, scale)
    steps = numbers / scale.astype(np.float32)[..., None]
    np.testing.assert_array_equal(unpack(part.planes, 8), np.clip(np.rint(steps), -127, 127))


@pytest.mark.parametrize("groups", [{}, {"token_group": 8}, {"channel_group": 8}])
@pytest.mark.parametrize("clip", [1.0, 0.9])
def test_asymmetric_integers_end_at_the_least_and_the_largest(groups, clip):
    numbers = drawn(1, 2, 16, 32)
    part = encode(jnp.asarray(numbers), Integers(bits=3, clip=clip, **groups))
    axis, shape = (
        (3, (1, 2, 2, 8, 32)) if "token_group" in groups else (4, (1, 2, 16, 32 // groups.get("channel_group", 32), -1))
    )
    grouped = numbers.reshape(shape)
    low, high = grouped.min(axis=axis, keepdims=True), grouped.max(axis=axis, keepdims=True)
    cut = (high - low) * (1 - clip) / 2
    held = np.clip(grouped, low + cut, high - cut).reshape(numbers.shape)
    step = np.broadcast_to((high - low) * clip / 7, grouped.shape).reshape(numbers.shape)
    assert (np.abs(np.asarray(part.read()) - held) <= 0.51 * step + 2e-3).all()


def test_a_transform_comes_first():
    numbers, own = drawn(2, 3, 8, 16), drawn(3, 16, 12, seed=1)
    rows = drawn(2, 3, 16, 12, seed=2)
    for basis in (own[0], own, rows):
        wide = basis if basis.ndim == 4 else np.broadcast_to(basis, (2, 3, 16, 12))
        expected = np.einsum("bksd,bkdr->bksr", numbers.astype(np.float64), wide)
        np.testing.assert_allclose(transform(jnp.asarray(numbers), jnp.asarray(basis)), expected, atol=1e-5)
        through = encode(jnp.asarray(numbers), RULES["int8"], basis=jnp.asarray(basis))
        np.testing.assert_allclose(through.read(), expected, atol=np.abs(expected).max() / 200)


def test_zeros_have_scale_zero_and_what_is_too_large_or_small_stays_finite():
    numbers = drawn(1, 1, 8, 16) * np.asarray([0, 1e-30, 1e-9, 1e9, 1e30, 1, 1, 1], np.float32).reshape(1, 1, 8, 1)
    uneven = (Table(levels=UNEVEN, scale=scale) for scale in ("unbiased", "largest"))
    for rule in (RULES["int8"], RULES["minmax4"], RULES["half2"], *uneven):
        part = encode(jnp.asarray(numbers), rule)
        assert np.isfinite(part.read()).all()
        np.testing.assert_array_equal(part.read()[0, 0, 0], 0)


def test_scales_are_held_within_a_float16():
    np.testing.assert_array_equal(to_scale(jnp.asarray([1e9, -1e9, 3.0])), np.asarray([65504, -65504, 3], np.float16))
    assert read_scale(jnp.asarray(1.0001)).dtype == jnp.float32
    np.testing.assert_array_equal(divide(jnp.asarray([1.0, 0.0, 6.0]), jnp.asarray([0.0, 0.0, 2.0])), [0, 0, 3])
    np.testing.assert_array_equal(inverse(jnp.asarray([0.0, 1e-39, 4.0, -2.0])), [0, 0, 0.25, -0.5])
    assert thresholds((-1.0, 0.0, 3.0)) == (-0.5, 1.5)
