"""Random rotations: orthogonal, and random enough for keys with an offset or with outlier channels."""

import numpy as np
import pytest
from scipy import linalg

from kvjax.stages.levels import LloydMax
from kvjax.stages.linear import rotation
from kvjax.stages.rotation import dense_rotation, hadamard_rotation, is_power_of_two
from tests.fitted import normal, relative_error, through

PLAIN = (linalg.hadamard(128) / np.sqrt(128)).astype(np.float32)


def quantised_error(vectors, turn, *, bits):
    """Relative error of vectors `S 128` that are rotated, kept at the paper's scale and rotated back."""
    decoded = through(LloydMax(bits=bits, scale="raw"), vectors @ turn.T) @ turn
    return relative_error(vectors, decoded)


def with_offset():
    return 0.3 * normal(1024, 128) + 1


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
@pytest.mark.parametrize("size", [2, 16, 128])
def test_rotations_are_orthogonal(kind, size):
    for seed in (0, 7):
        turn = rotation(kind, size, seed)
        assert turn.dtype == np.float32
        np.testing.assert_allclose(turn @ turn.T, np.eye(size), rtol=0, atol=2e-6)


def test_rotations_are_drawn_from_their_seed():
    for draw in (hadamard_rotation, dense_rotation):
        np.testing.assert_array_equal(draw(64, 3), draw(64, 3))
        assert np.abs(draw(64, 3) - draw(64, 4)).max() > 0.1


def test_dense_rotations_take_any_size_and_are_even():
    """Entries of mean 0 and variance 1/d with no sign preferred on the diagonal, as QR without its signs would have."""
    sizes = [dense_rotation(size, 0).shape for size in (3, 80, 96)]
    assert sizes == [(3, 3), (80, 80), (96, 96)]
    draws = np.stack([dense_rotation(16, seed) for seed in range(800)])
    assert np.abs(draws.mean(axis=0)).max() < 5 * 0.25 / np.sqrt(800)
    np.testing.assert_allclose(np.mean(draws**2, axis=0), 1 / 16, rtol=0.25)
    assert abs(np.mean(np.linalg.det(draws))) < 0.15


def test_powers_of_two():
    assert [size for size in range(-1, 70) if is_power_of_two(size)] == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("seed", range(6))
def test_signs_are_not_linear_in_the_bits_of_an_index(seed):
    """Such signs only permute what a plain Hadamard matrix gives, so that an offset would stay in one number."""
    signs = hadamard_rotation(128, seed)[0] * np.sqrt(128)
    spectrum = np.abs(linalg.hadamard(128) @ signs)  # 128 in one place if the signs are linear
    assert spectrum.max() < 64


@pytest.mark.parametrize("seed", range(4))
def test_an_offset_of_all_channels_needs_the_signs(seed):
    """0.3 N(0, 1) + 1 at 2 bits: error 0.10 with random signs, 0.76 with a plain Hadamard matrix."""
    vectors = with_offset()
    assert quantised_error(vectors, hadamard_rotation(128, seed), bits=2) < 0.13
    assert quantised_error(vectors, dense_rotation(128, seed), bits=2) < 0.15
    assert quantised_error(vectors, PLAIN, bits=2) > 0.7


@pytest.mark.parametrize(("bits", "plain"), [(3, 0.610), (4, 0.519)])
def test_more_bits_do_not_replace_the_signs(bits, plain):
    vectors = with_offset()
    assert quantised_error(vectors, hadamard_rotation(128, 0), bits=bits) < {3: 0.036, 4: 0.0100}[bits]
    assert quantised_error(vectors, PLAIN, bits=bits) == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(("bits", "unrotated", "rotated"), [(2, 0.65, 0.092), (3, 0.49, 0.0286), (4, 0.40, 0.0081)])
def test_two_outlier_channels(bits, unrotated, rotated):
    """Two channels 30 times larger spoil what is not rotated; rotated, vectors do better than random ones."""
    vectors = normal(1024, 128)
    vectors[:, [5, 77]] *= 30
    assert quantised_error(vectors, np.eye(128, dtype=np.float32), bits=bits) == pytest.approx(unrotated, rel=0.1)
    errors = [quantised_error(vectors, hadamard_rotation(128, seed), bits=bits) for seed in range(3)]
    np.testing.assert_allclose(errors, rotated, rtol=0.1)
