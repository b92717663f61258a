"""int4: half-integer levels after a rotation, or the range from least to largest."""

import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from kvjax.stages.codebook import distortion
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, stored

LOSS = distortion(tuple((index + 0.5) * 0.3352 for index in range(-8, 8)), 128)
ROTATED = 2 - 2 * np.sqrt(1 - LOSS)  # the best uniform levels for the normal, the length kept
PLAIN = 0.00996  # from least to largest of 128 normal numbers


def test_stored_bytes():
    """A scale a token, and an offset where the range is from least to largest."""
    assert bytes_a_token("int4") == 128 * 4 / 8 + 2
    assert bytes_a_token("int4", rotation="dense", shape=shape_of(head_size=80)) == 80 * 4 / 8 + 2
    assert bytes_a_token("int4", range="minmax") == 128 * 4 / 8 + 4
    assert bytes_a_token("int4", rotation="none") == 128 * 4 / 8 + 4
    assert bytes_a_token("int4", rotation="none", range="normal") == 128 * 4 / 8 + 2


@pytest.mark.parametrize("options", [{}, {"rotation": "dense"}, {"range": "normal", "rotation": "none"}])
def test_the_error_of_levels_for_the_normal(options):
    assert error_of("int4", normal(1, 2, 1024, 128), **options) == pytest.approx(ROTATED, rel=0.03)


@pytest.mark.parametrize("options", [{"range": "minmax"}, {"rotation": "none"}])
def test_the_error_from_least_to_largest(options):
    assert error_of("int4", normal(1, 2, 1024, 128), "values", **options) == pytest.approx(PLAIN, rel=0.03)


def test_the_rotation_is_for_outlier_channels():
    """Two channels 30 times larger: without a rotation what is left of the others is noise."""
    vectors = normal(1, 2, 1024, 128)
    vectors[..., [5, 77]] *= 30
    codec, arrays = fitted("int4")
    plain, plain_arrays = fitted("int4", rotation="none")
    kept = [stored(*pair, vectors)[1] for pair in ((codec, arrays), (plain, plain_arrays))]
    errors = [np.mean((np.asarray(one) - vectors) ** 2) / np.mean(vectors**2) for one in kept]
    assert errors[0] < 1.1 * ROTATED
    assert errors[1] > 2 * errors[0]


@pytest.mark.parametrize("options", [{"rope": "pre"}, {"mean": "prompt"}, {"rope": "pre", "mean": "prompt"}])
def test_before_rope_and_about_a_mean(options):
    assert error_of("int4", normal(1, 2, 1024, 128), **options) == pytest.approx(ROTATED, rel=0.04)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rotation": "hadamart"}, r"int4\(rotation\) is hadamart; .* The nearest is hadamard\."),
        ({"range": "max"}, r"int4\(range\) is max; .* The nearest is minmax\."),
        ({"mean": "calibrate"}, r"mean is calibrate; .* The nearest is calibrated\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("int4")("keys", **wrong)


def test_head_sizes_that_a_hadamard_matrix_cannot_rotate():
    with pytest.raises(UserError, match=r"the model's is 80: use rotation=dense\."):
        fitted("int4", shape=shape_of(head_size=80))
