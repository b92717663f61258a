"""How queries become integers, and the dither of weights; numbers are tested in test_mosaic_tpu.py."""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import mosaic_codes


def test_queries_are_two_planes_of_bytes_in_the_unit_of_their_head():
    queries = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8, 64)), jnp.float32)
    planes, unit, sums = mosaic_codes._as_integers(queries)
    whole = np.asarray(planes[:, :, :8], np.int64) * 256 + np.asarray(planes[:, :, 8:])
    np.testing.assert_allclose(whole * np.asarray(unit)[..., None, None], queries, atol=float(unit.max()) * 0.51)
    np.testing.assert_array_equal(sums, whole.sum(-1))
    assert np.abs(whole).max() == 127 * 256 + 127


def test_products_of_wide_heads_fit_32_bits():
    planes, _, _ = mosaic_codes._as_integers(jnp.ones((1, 1, 8, 576), jnp.float32))
    whole = np.asarray(planes[0, 0, 0], np.int64) * 256 + np.asarray(planes[0, 0, 8])
    assert 2**31 * 0.99 < whole.sum() * 128 < 2**31


def test_a_head_of_zeros_stays_zero():
    planes, unit, sums = mosaic_codes._as_integers(jnp.zeros((1, 1, 8, 64), jnp.float32))
    for array in (planes, unit, sums):
        assert not array.any()


def test_dithers_fill_the_unit_interval_evenly():
    """In each tile, each row, and at each lane over tiles."""
    dither = np.asarray(mosaic_codes._dither())
    assert dither.min() >= -0.5
    assert dither.max() < 0.5
    assert np.abs(dither.mean(axis=2)).max() < 0.02
    assert np.abs(dither.mean(axis=(0, 1))).max() < 0.1
    assert np.abs(np.sort(dither[0].ravel()) - (np.arange(1024) + 0.5) / 1024 + 0.5).max() < 0.003
