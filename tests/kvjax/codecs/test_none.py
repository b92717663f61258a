"""none: vectors as they are, with a mean taken off or before RoPE where asked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, stored


@pytest.mark.parametrize("role", ["keys", "values"])
def test_vectors_are_kept_in_the_models_dtype(role):
    vectors = normal(2, 2, 16, 32)
    for dtype in ("float32", "bfloat16"):
        codec, arrays = fitted("none", role, shape=shape_of(head_size=32, dtype=dtype))
        assert arrays == {}
        _, decoded, _ = stored(codec, arrays, vectors)
        np.testing.assert_array_equal(decoded, jnp.asarray(vectors, dtype).astype(jnp.float32))


def test_two_bytes_a_number_in_bfloat16():
    assert 2 * bytes_a_token("none") == 512
    assert bytes_a_token("none", mean="prompt", rope="pre") == 256


@pytest.mark.parametrize("options", [{"mean": "prompt"}, {"rope": "pre"}, {"mean": "prompt", "rope": "pre"}])
def test_the_stages_alone_change_nothing_but_the_last_bits(options):
    assert error_of("none", normal(1, 2, 64, 128), **options) < 1e-11


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mean": "promt"}, r"mean is promt; .* The nearest is prompt\."),
        ({"rope": "per"}, r"rope is per; it must be one of post, pre\. The nearest is pre\."),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("none")("keys", **wrong)
