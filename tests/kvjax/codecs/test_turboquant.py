"""turboquant: bits, errors and products of every choice, against theory."""

import numpy as np
import pytest

from kvjax.codec import CODECS
from kvjax.errors import UserError
from tests.fitted import bytes_a_token, error_of, fitted, normal, shape_of, stored

MEASURED = {  # relative error at D = 128, 1 to 4 bits
    "raw": [0.361, 0.1160, 0.0340, 0.00934],
    "norm": [0.401, 0.1188, 0.0338, 0.00920],
    "unbiased": [0.567, 0.1305, 0.0347, 0.00927],
}


def bits_of(**arguments):
    return bytes_a_token("turboquant", **arguments) * 8 / 128


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
def test_stored_bits(bits):
    """A 16-bit scale a token, and another for the sketch where there are levels before it."""
    assert bits_of(bits=bits) == bits + 16 / 128
    for kind in ("gaussian", "orthogonal"):
        assert bits_of(bits=bits, prod=kind) == bits + (32 if bits > 1 else 16) / 128


@pytest.mark.parametrize(("bits", "options"), [(2.5, {}), (3.5, {}), (2.5, {"rotation": "dense", "scale": "raw"})])
def test_the_papers_fractions_are_fractions_all_counted(bits, options):
    assert bits_of(bits=bits, **options) == bits


@pytest.mark.parametrize(
    ("keys", "values", "both"),
    [(4.0, 4.0, 132), (3.0, 3.0, 100), (2.0, 2.0, 68), (4.0, 2.0, 100), (3.0, 2.0, 84), (4.0, 3.0, 116)],
)
def test_stored_bytes(keys, values, both):
    found = bytes_a_token("turboquant", bits=keys) + bytes_a_token("turboquant", "values", bits=values)
    assert found == both


@pytest.mark.parametrize("scale", MEASURED)
@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
def test_the_error_of_each_scale(bits, scale):
    """Within 2 % of what was measured for random vectors; random normal vectors are that, whatever their length."""
    found = error_of("turboquant", normal(1, 2, 2048, 128), bits=bits, scale=scale)
    assert found == pytest.approx(MEASURED[scale][int(bits) - 1], rel=0.02)


@pytest.mark.parametrize(
    "options", [{"rotation": "dense"}, {"table": "normal"}, {"seed": 5}, {"rope": "pre"}, {"mean": "prompt"}]
)
def test_other_choices_err_alike(options):
    for role in ("keys", "values"):
        assert error_of("turboquant", normal(1, 2, 2048, 128), role, **options) == pytest.approx(0.0092, rel=0.03)


def test_outlier_channels_get_one_bit_more():
    """A quarter of the channels ten times larger: their error is that of 3 bits, the others' that of 2."""
    large = list(range(2, 128, 4))
    others = sorted(set(range(128)) - set(large))
    vectors = normal(1, 2, 1024, 128)
    vectors[..., large] *= 10
    codec, arrays = fitted("turboquant", bits=2.5, scale="raw")
    _, decoded, arrays = stored(codec, arrays, vectors)
    np.testing.assert_array_equal(arrays["channels"][0, 0], large + others)
    rest = np.asarray(decoded) - vectors
    errors = [np.sum(rest[..., part] ** 2) / np.sum(vectors[..., part] ** 2) for part in (large, others)]
    assert errors[0] == pytest.approx(0.032261, rel=0.03)  # 32 numbers, 3 bits
    assert errors[1] == pytest.approx(0.115508, rel=0.03)  # 96 numbers, 2 bits
    whole = error_of("turboquant", vectors, bits=3.0, scale="raw")
    assert np.sum(rest**2) / np.sum(vectors**2) < 1.1 * whole  # of which each number has 3 bits


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_a_sketch_restores_less_than_one_more_bit_of_levels(kind):
    """prod is made for products; as a vector it is farther off: |r|^2 (1 + pi/2 - 1) or |r|^2 (pi/2 - 1)."""
    found = error_of("turboquant", normal(1, 2, 1024, 128), bits=3.0, prod=kind)
    factor = {"gaussian": np.pi / 2, "orthogonal": np.pi / 2 - 1}[kind]
    assert found == pytest.approx(factor * 0.1160, rel=0.05)
    assert found > error_of("turboquant", normal(1, 2, 1024, 128), bits=3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 5.0}, r"turboquant\(bits\) is 5\.0; it must be one of 1, 2, 2\.5, 3, 3\.5, 4\. The nearest is 4\."),
        ({"bits": 2.4}, r"The nearest is 2\.5\."),
        ({"rotation": "none"}, r"turboquant\(rotation\) is none; it must be one of hadamard, dense"),
        ({"table": "beat"}, r"turboquant\(table\) is beat; .* The nearest is beta\."),
        ({"scale": "norms"}, r"turboquant\(scale\) is norms; .* The nearest is norm\."),
        ({"prod": "gauss"}, r"turboquant\(prod\) is gauss; .* The nearest is gaussian\."),
        ({"bits": 2.5, "prod": "gaussian"}, r"takes whole bits, not 2\.5\. The nearest is 2\."),
        ({"prod": "gaussian", "rope": "pre"}, r"turboquant with prod keeps rope=post"),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("turboquant")("keys", **wrong)


def test_rope_means_nothing_for_values_and_odd_sizes_take_a_dense_rotation():
    assert CODECS.get("turboquant")("values", prod="gaussian", rope="pre").before_rope is False
    with pytest.raises(UserError, match=r"the model's is 96: use rotation=dense\."):
        fitted("turboquant", shape=shape_of(head_size=96))
    found = error_of("turboquant", normal(1, 2, 512, 96), shape=shape_of(head_size=96), rotation="dense", scale="raw")
    assert found == pytest.approx(0.009253, rel=0.02)
