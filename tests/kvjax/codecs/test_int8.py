"""int8: symmetric integers at a scale a token."""

import numpy as np
import pytest

from kvjax._kernels import unpack
from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, stored


def test_stored_bytes():
    assert bytes_a_token("int8") == 128 + 2
    assert bytes_a_token("int8", "values", shape=shape_of(head_size=64)) == 64 + 2


@pytest.mark.parametrize("role", ["keys", "values"])
def test_the_error_on_normal_numbers(role):
    assert error_of("int8", normal(1, 2, 1024, 128), role) == pytest.approx(4.2e-5, rel=0.04)


def test_codes_reach_127_on_one_side():
    vectors = normal(1, 2, 16, 128)
    codec, arrays = fitted("int8")
    parts, decoded, _ = stored(codec, arrays, vectors)
    codes = np.asarray(unpack(parts[0].planes, 8))
    np.testing.assert_array_equal(np.abs(codes.astype(int)).max(axis=-1), 127)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    assert np.abs(decoded - vectors).max() <= (largest / 127 / 2 + largest * 2**-11).max()


def test_before_rope_and_about_a_mean():
    """The stages before change the error of normal vectors but little."""
    for options in ({"rope": "pre"}, {"mean": "prompt"}, {"rope": "pre", "mean": "prompt"}):
        assert error_of("int8", normal(1, 2, 1024, 128), **options) == pytest.approx(4.2e-5, rel=0.05)


def test_others_are_refused():
    with pytest.raises(UserError, match=r"rope is before; it must be one of post, pre"):
        CODECS.get("int8")("keys", rope="before")
