"""nf: NormalFloat, or the levels of a file, at a scale a token."""

import json

import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.codecs.nf import read_table
from kvjax.errors import UserError
from kvjax.stages.codebook import normal_float
from tests.fitted import bytes_a_token, error_of, fitted, normal, stored


def nearest(vectors, levels):
    """Each number as the nearest level times the vector's largest size over the largest level."""
    levels = np.asarray(levels)
    scale = np.abs(vectors).max(axis=-1, keepdims=True) / np.abs(levels).max()
    return levels[np.abs(vectors[..., None] / scale[..., None] - levels).argmin(axis=-1)] * scale


def write(folder, levels):
    path = folder / "levels.json"
    path.write_text(levels if isinstance(levels, str) else json.dumps(levels))
    return str(path)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_stored_bytes(bits):
    assert bytes_a_token("nf", bits=bits) == 128 * bits / 8 + 2


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("role", ["keys", "values"])
def test_the_nearest_levels_are_kept(bits, role):
    vectors = normal(1, 2, 64, 128)
    codec, arrays = fitted("nf", role, bits=bits)
    _, decoded, _ = stored(codec, arrays, vectors)
    expected = nearest(vectors, normal_float(bits))
    assert np.abs(decoded - expected).max() <= 2**-11 * np.abs(vectors).max()


def test_the_error_on_normal_numbers():
    """At the largest of 128 numbers NF4 does better than the range from least to largest in 15 steps."""
    vectors = normal(1, 2, 512, 128)
    expected = np.mean((nearest(vectors, normal_float(4)) - vectors) ** 2)
    for options in ({}, {"rotation": "hadamard"}, {"rotation": "dense"}, {"rope": "pre"}, {"mean": "prompt"}):
        found = error_of("nf", vectors, **options)
        assert found == pytest.approx(expected, rel=0.04), options
        assert found < 0.00996


def test_levels_from_a_file(tmp_path):
    """In any order, not mirrored, with bits of their own."""
    levels = [0.5, -1.0, 0.1, 2.0, -3.0, -0.2, 0.9, 1.3]
    path = write(tmp_path, levels)
    assert read_table(path) == tuple(sorted(levels))
    assert bytes_a_token("nf", table=path) == 128 * 3 / 8 + 2
    vectors = normal(1, 2, 16, 128)
    codec, arrays = fitted("nf", table=path)
    _, decoded, _ = stored(codec, arrays, vectors)
    assert np.abs(decoded - nearest(vectors, levels)).max() <= 2**-11 * np.abs(vectors).max()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ("{", "is not JSON"),
        ({"levels": [1, 2]}, "must hold a JSON list of numbers"),
        ([1, "2"], "must hold a JSON list of numbers"),
        ([True, False], "must hold a JSON list of numbers"),
        ([1.0], "holds 1 levels; expected 2, 4, 8, ... 256 different numbers"),
        ([1, 2, 3], "holds 3 levels"),
        ([1, 1, 2, 3], "holds 4 levels; expected .* different numbers"),
        (list(range(512)), "holds 512 levels"),
        ("[NaN, 1.0]", "numbers"),
        ("[-Infinity, 1.0]", "numbers"),
    ],
)
def test_files_that_hold_no_levels(tmp_path, levels, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("nf")("keys", table=write(tmp_path, levels))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 1}, r"nf\(bits\) is 1; .* The nearest is 2\."),
        ({"rotation": "hadamrd"}, r"nf\(rotation\) is hadamrd; .* The nearest is hadamard\."),
        ({"table": "nowhere.json"}, r"There is no table of levels 'nowhere\.json'"),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("nf")("keys", **wrong)
