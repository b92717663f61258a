"""oscar: a rotation fitted to the queries, then a clipped range of 2-bit integers."""

import numpy as np
import pytest

from kvjax.codec import CODECS, ExactSizes
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, relative_error, shape_of, statistics_of, stored

SHAPE = shape_of(head_size=128)
CLIPS = {"keys": 0.96, "values": 0.92}


@pytest.fixture(scope="module")
def statistics():
    """Of queries with a few directions that are ten times larger than the others."""
    queries = normal(1, 4, 256, 128, seed=3)
    queries[..., :8] *= 10
    return statistics_of(SHAPE, normal(1, 2, 256, 128, seed=4), queries=queries)


def clipped(numbers, bits, clip):
    """The least to the largest number of each row, a share of it about its middle, in 2**bits steps."""
    low, high = numbers.min(axis=-1, keepdims=True), numbers.max(axis=-1, keepdims=True)
    middle, reach = (low + high) / 2, (high - low) / 2 * clip
    step = 2 * reach / (2**bits - 1)
    return middle - reach + step * np.clip(np.round((numbers - middle + reach) / step), 0, 2**bits - 1)


def test_stored_bytes(statistics):
    for bits in (2, 4):
        assert bytes_a_token("oscar", shape=SHAPE, statistics=statistics, bits=bits) == 128 * bits / 8 + 4


@pytest.mark.parametrize("role", CLIPS)
@pytest.mark.parametrize("options", [{}, {"bits": 3, "clip": 0.8}, {"bits": 4, "clip": 1.0}])
def test_rows_are_rotated_clipped_and_rounded(statistics, role, options):
    """Against NumPy, up to a float16 of scales and offsets; 0 takes the published share of the range."""
    vectors = normal(1, 2, 64, 128)
    codec, arrays = fitted("oscar", role, shape=SHAPE, statistics=statistics, **options)
    basis = np.asarray(arrays["basis"])
    _, decoded, _ = stored(codec, arrays, vectors)
    expected = clipped(vectors @ basis, options.get("bits", 2), options.get("clip", CLIPS[role])) @ basis.swapaxes(1, 2)
    assert relative_error(expected, decoded) < 1e-5
    assert CLIPS[role] in (0.96, 0.92)


def test_the_published_share_of_the_range_is_worth_its_while(statistics):
    errors = [
        error_of("oscar", normal(1, 2, 512, 128), shape=SHAPE, statistics=statistics, clip=clip) for clip in (1.0, 0.0)
    ]
    assert errors[0] == pytest.approx(0.2508, rel=0.03)
    assert errors[1] < 0.95 * errors[0]


def test_what_the_queries_see_is_spread_over_all_numbers(statistics):
    """Keys with a large number in a direction that matters have it everywhere after the rotation."""
    _, arrays = fitted("oscar", shape=SHAPE, statistics=statistics)
    direction = np.zeros(128, np.float32)
    direction[3] = 1
    spread = np.abs(direction @ arrays["basis"][0])
    assert spread.max() < 0.5
    second = np.asarray(statistics.queries_second)
    shares = np.einsum("kdr,kde,ker->kr", arrays["basis"], second, arrays["basis"])
    np.testing.assert_allclose(shares, shares.mean(axis=1, keepdims=True).repeat(128, 1), rtol=1e-2)


def test_about_a_mean(statistics):
    vectors = normal(1, 2, 256, 128)
    plain, about = (
        error_of("oscar", vectors, shape=SHAPE, statistics=statistics, mean=mean) for mean in ("none", "prompt")
    )
    assert about == pytest.approx(plain, rel=0.05)


def test_as_published_sinks_and_a_window_are_exact():
    assert CODECS.get("oscar")("values").exact == ExactSizes(sinks=64, window=256, round=128)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 8}, r"oscar\(bits\) is 8; .* The nearest is 4\."),
        ({"clip": 1.2}, r"oscar\(clip\) is 1\.2; .* The nearest is 1\.0\."),
        ({"mean": "promt"}, r"mean is promt; .* The nearest is prompt\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("oscar")("keys", **wrong)


def test_what_does_not_suit_the_model():
    with pytest.raises(UserError, match=r"python -m kvjax\.calibrate"):
        fitted("oscar", shape=SHAPE)
    with pytest.raises(UserError, match=r"the model's is 80: use turboquant with rotation=dense\."):
        fitted("oscar", shape=shape_of(head_size=80))
