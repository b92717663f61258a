"""think: half of the key channels are not stored; values are as they were."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, stored

SIZES = np.linspace(0.2, 2, 128, dtype=np.float32)


def test_stored_bytes():
    assert [bytes_a_token("think", role) for role in ("keys", "values")] == [128, 256]
    assert bytes_a_token("think", ratio=0.4) == 2 * (128 - 51)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5])
def test_the_smallest_channels_are_lost_and_nothing_else(ratio):
    keys, dropped = normal(1, 2, 512, 128) * SIZES, int(128 * ratio)
    found = error_of("think", keys, ratio=ratio)
    assert found == pytest.approx(np.sum(SIZES[:dropped] ** 2) / np.sum(SIZES**2), rel=0.05, abs=1e-12)
    assert error_of("think", keys, "values", ratio=ratio) == 0


def test_each_row_and_head_has_channels_of_its_own_by_its_queries():
    """Kept channels come back as they were, the others as zeros; a head's queries decide among equal keys."""
    shape, keys = shape_of(head_size=16), np.ones((2, 2, 8, 16), np.float32)
    queries = 0.01 * normal(2, 32, 4, 16)
    seen = {(0, 0): [0, 1, 2, 3], (0, 1): [4, 5, 6, 7], (1, 0): [8, 9, 10, 11], (1, 1): [0, 5, 10, 15]}
    for (row, head), channels in seen.items():
        queries[row, :, 2 * head + 1, channels] += 5.0  # the second of the two heads that share the key
    codec, arrays = fitted("think", shape=shape, ratio=0.75)
    _, decoded, arrays = stored(codec, arrays, keys, queries=jnp.asarray(queries))
    for (row, head), channels in seen.items():
        assert np.asarray(arrays["channels"])[row, head].tolist() == channels
        expected = np.isin(np.arange(16), channels).astype(np.float32)
        np.testing.assert_array_equal(decoded[row, head], np.broadcast_to(expected, (8, 16)))


@pytest.mark.parametrize(
    ("ratio", "message"),
    [
        (-0.1, r"think\(ratio\) is -0\.1; it must be at least 0\.0 and below 1\.0\. The nearest is 0\.0\."),
        (1.0, r"think\(ratio\) is 1\.0; it must be at least 0\.0 and below 1\.0\."),
    ],
)
def test_others_are_refused(ratio, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("think")("keys", ratio=ratio)
