"""fp8: the formats' errors, their largest numbers, and what a scale a token is for."""

import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, stored

ERRORS = {"e4m3": 0.000705, "e5m2": 0.0028}


def test_stored_bytes():
    assert 2 * bytes_a_token("fp8") == 256
    assert bytes_a_token("fp8", scale="token") == 128 + 2


@pytest.mark.parametrize("format", ERRORS)
@pytest.mark.parametrize("scale", ["none", "token"])
@pytest.mark.parametrize("size", [0.1, 10.0])
def test_the_error_does_not_depend_on_the_size(format, scale, size):
    vectors = size * normal(1, 2, 512, 128)
    assert error_of("fp8", vectors, format=format, scale=scale) == pytest.approx(ERRORS[format], rel=0.08)


def test_large_numbers_are_held_and_with_a_scale_kept():
    vectors = 1000 * normal(1, 2, 64, 128)
    codec, arrays = fitted("fp8")
    _, held, _ = stored(codec, arrays, vectors)
    beyond = np.abs(vectors) > 480
    np.testing.assert_array_equal(held[beyond], 448 * np.sign(vectors[beyond]))
    assert error_of("fp8", vectors, scale="token") == pytest.approx(ERRORS["e4m3"], rel=0.08)


@pytest.mark.parametrize("options", [{"rope": "pre"}, {"mean": "prompt"}, {"rope": "pre", "mean": "prompt"}])
def test_before_rope_and_about_a_mean(options):
    assert error_of("fp8", normal(1, 2, 512, 128), **options) == pytest.approx(ERRORS["e4m3"], rel=0.08)


def test_auto_is_e4m3_where_nothing_speaks_against_it():
    assert fitted("fp8")[0].quantiser.dtype == "float8_e4m3fn"
    assert fitted("fp8", format="e5m2")[0].quantiser.dtype == "float8_e5m2"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"format": "e4m4"}, r"fp8\(format\) is e4m4; .* The nearest is e4m3\."),
        ({"scale": "tokens"}, r"fp8\(scale\) is tokens; .* The nearest is token\."),
        ({"mean": "prompts"}, r"mean is prompts; .* The nearest is prompt\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("fp8")("keys", **wrong)
