"""kivi: keys by channel over tokens, values by token over channels."""

import numpy as np
import pytest

from kvjax.codec import CODECS, ExactSizes
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from tests.fitted import bytes_a_token, error_of, fitted, normal, relative_error, shape_of, stored

ERRORS = {(2, 32): 0.1543, (2, 64): 0.2027, (2, 128): 0.2508, (3, 32): 0.0281, (4, 32): 0.00612, (4, 128): 0.00996}


@pytest.mark.parametrize(("bits", "group", "both"), [(4, 32, 160), (4, 128, 136), (2, 32, 96), (2, 128, 72)])
def test_stored_bytes(bits, group, both):
    """A scale and an offset for every group: bits + 32/group a number."""
    roles = [bytes_a_token("kivi", role, bits=bits, group=group) for role in ("keys", "values")]
    assert roles == [128 * (bits + 32 / group) / 8] * 2
    assert sum(roles) == both


@pytest.mark.parametrize(("bits", "group"), ERRORS)
@pytest.mark.parametrize("role", ["keys", "values"])
def test_the_error_on_normal_numbers(bits, group, role):
    found = error_of("kivi", normal(1, 2, 512, 128), role, bits=bits, group=group)
    assert found == pytest.approx(ERRORS[bits, group], rel=0.03)


def test_each_role_has_its_axis():
    """Channels ten times larger spoil values and not keys; tokens ten times larger, keys and not values."""
    by_channel, by_token = normal(1, 2, 512, 128), normal(1, 2, 512, 128, seed=1)
    by_channel[..., ::16] *= 10
    by_token[:, :, ::16] *= 10
    plain = [channel for channel in range(128) if channel % 16]
    errors = {}
    for role in ("keys", "values"):
        codec, arrays = fitted("kivi", role)
        small = stored(codec, arrays, by_channel)[1][..., plain]
        rows = stored(codec, arrays, by_token)[1][:, :, plain]
        errors[role] = relative_error(by_channel[..., plain], small), relative_error(by_token[:, :, plain], rows)
    assert errors["keys"][0] < 0.17 < 1.0 < errors["values"][0]
    assert errors["values"][1] < 0.17 < 1.0 < errors["keys"][1]


def test_keys_come_in_groups_of_tokens():
    assert fitted("kivi", group=64)[0].granule == 64
    assert fitted("kivi", "values", group=64)[0].granule == 1
    with pytest.raises(UserError, match=r"exact\(round\) is 40; .* multiple of 32\. The nearest is 32"):
        parse_policy("kivi+exact(round=40)")


def test_as_published_nothing_but_the_newest_tokens_is_exact():
    assert CODECS.get("kivi")("keys").exact == ExactSizes(sinks=0, window=0, round=128)


@pytest.mark.parametrize("options", [{"rope": "pre"}, {"mean": "prompt"}])
def test_before_rope_and_about_a_mean(options):
    assert error_of("kivi", normal(1, 2, 512, 128), bits=4, **options) == pytest.approx(0.00612, rel=0.04)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bits": 7}, r"kivi\(bits\) is 7; it must be one of 1, 2, 3, 4, 5, 6, 8\. The nearest is 6\."),
        ({"group": 48}, r"kivi\(group\) is 48; .* The nearest is 32\."),
        ({"group": 256}, r"kivi\(group\) is 256; .* The nearest is 128\."),
        ({"rope": "none"}, r"rope is none; it must be one of post, pre"),
    ],
)
def test_others_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        CODECS.get("kivi")("keys", **wrong)


def test_channel_groups_divide_the_head_size():
    with pytest.raises(UserError, match=r"128 channels do not divide the head size 64\. .* group=64\."):
        fitted("kivi", "values", group=128, shape=shape_of(head_size=64))
    assert fitted("kivi", "keys", group=128, shape=shape_of(head_size=64))[0].granule == 128
    assert np.isfinite(error_of("kivi", normal(1, 2, 128, 96), "values", shape=shape_of(head_size=96)))
