"""Quantisers against the KIVI authors' arrays, golden numbers, and what theory says of their errors."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax._kernels import unpack
from kvjax.errors import UserError
from kvjax.stages.levels import LloydMax
from kvjax.stages.quantise import Exact, Float8, Split, Uniform
from kvjax.stages.sketch import Sketch
from tests.fitted import encoded, normal, relative_error, through

BY_CHANNEL = {"keys": {"token_group": 32}, "values": {"channel_group": 32}}


def codes_of(part):
    """Codes that count from 0."""
    return np.asarray(unpack(part.planes, part.bits)).astype(int) + (1 << part.bits) // 2


def laid_out(role, arrays):
    """KIVI's scales as ours: keys `B H T/32 1 D` to `B K S/t R`, values `B H T D/32 1` to `B K C S`."""
    return arrays[:, :, :, 0] if role == "keys" else np.swapaxes(arrays[..., 0], 2, 3)


@pytest.fixture(scope="module")
def kivi(golden):
    with np.load(golden / "kivi.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("role", BY_CHANNEL)
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_and_scales_are_those_of_the_authors_of_kivi(kivi, role, bits):
    """Codes equal; scales, offsets and numbers equal to the rounding of a float16, in which ours are kept."""
    (part,), read = encoded(Uniform(bits=bits, **BY_CHANNEL[role]), kivi[role])
    np.testing.assert_array_equal(codes_of(part), kivi[f"{role}{bits}_codes"])
    scale, low = (laid_out(role, kivi[f"{role}{bits}_{name}"]) for name in ("scale", "min"))
    np.testing.assert_allclose(part.scale, scale, rtol=2**-11 + 1e-6)
    np.testing.assert_allclose(part.offset, low, rtol=2**-11 + 1e-6)
    codes, restored = kivi[f"{role}{bits}_codes"], kivi[f"{role}{bits}_restored"]
    steps = np.repeat(scale, 32, axis=2) if role == "keys" else np.repeat(np.swapaxes(scale, 2, 3), 32, axis=3)
    lowest = restored - steps * codes
    assert (np.abs(read - restored) <= 1.01 * 2**-11 * (steps * codes + np.abs(lowest))).all()


@pytest.mark.parametrize(
    ("bits", "scales", "first", "total", "error", "word"),
    [
        (
            2,
            [0.666094, 0.661891, 0.651368, 0.664416],
            [2, 3, 2, 2, 0, 0, 2, 1, 3, 2, 3, 1, 2, 0, 0, 2],
            203,
            0.050600,
            0x827B60AE,
        ),
        (
            4,
            [0.133219, 0.132378, 0.130274, 0.132883],
            [10, 14, 8, 10, 1, 1, 10, 7, 14, 11, 14, 6, 12, 2, 2, 12],
            1011,
            0.002438,
            0x7A11A8EA,
        ),
    ],
)
def test_golden_vector(bits, scales, first, total, error, word):
    """sin(0.7 i^2 + 0.3) + 0.25 in groups of 32, along the tokens of one channel and along the channels of a token."""
    vector = np.sin(0.7 * np.arange(128) ** 2 + 0.3) + 0.25
    along_tokens = jnp.asarray(vector, jnp.float32)[None, None, :, None]
    along_channels = jnp.broadcast_to(jnp.asarray(vector, jnp.float32), (1, 1, 8, 128))
    (tokens,), by_tokens = encoded(Uniform(bits=bits, token_group=32), along_tokens)
    (channels,), by_channels = encoded(Uniform(bits=bits, channel_group=32), along_channels)
    lows = [-0.748818, -0.745277, -0.749955, -0.743281]
    for codes, scale, offset, restored in (
        (codes_of(tokens)[0, 0, :, 0], tokens.scale[0, 0, :, 0], tokens.offset[0, 0, :, 0], by_tokens[0, 0, :, 0]),
        (
            codes_of(channels)[0, 0, 0],
            channels.scale[0, 0, :, 0],
            channels.offset[0, 0, :, 0],
            by_channels[0, 0, 0],
        ),
    ):
        np.testing.assert_array_equal(codes[:16], first)
        assert codes.sum() == total
        np.testing.assert_allclose(scale, scales, rtol=2**-11)
        np.testing.assert_allclose(offset, lows, rtol=2**-11)
        assert relative_error(vector, restored) == pytest.approx(error, rel=2e-3)  # float16 scales
    # Codes are kept in two's complement: less 2**(b - 1), which flips each one's highest bit.
    flipped = sum(1 << (bits - 1 + bits * index) for index in range(32 // bits))
    assert int(np.asarray(tokens.planes[0])[0, 0, :4, 0].view("<u4")[0]) ^ flipped == word


def test_the_wrong_axis_is_unmistakable(kivi):
    """Keys with large channels belong to channels, values whose tokens differ in size to tokens."""

    def small_channels_error(vectors, **groups):
        restored = encoded(Uniform(bits=2, **groups), vectors)[1]
        kept = [channel for channel in range(64) if channel not in (3, 17, 40)]  # the three that are ten times larger
        return relative_error(vectors[..., kept], restored[..., kept])

    right, wrong = (small_channels_error(kivi["keys"], **groups) for groups in BY_CHANNEL.values())
    assert right == pytest.approx(0.154, rel=0.1)
    assert wrong > 5 * right
    sizes = np.exp(1.5 * normal(2, 2, 128, 1, seed=3))
    values = kivi["values"] * sizes
    by_channel, by_token = (
        relative_error(values, encoded(Uniform(bits=2, **groups), values)[1]) for groups in BY_CHANNEL.values()
    )
    assert by_token == pytest.approx(0.154, rel=0.1)
    assert by_channel > 20 * by_token


FORMATS = [  # error of N(0, 1), half a unit of its last digit where that is not small
    *((Uniform(bits=2, channel_group=group), error, 0) for group, error in ((32, 0.1543), (64, 0.2027), (128, 0.2508))),
    *((Uniform(bits=3, channel_group=group), error, 0) for group, error in ((32, 0.0281), (64, 0.0370), (128, 0.0458))),
    *(
        (Uniform(bits=4, channel_group=group), error, 0)
        for group, error in ((32, 0.00612), (64, 0.00804), (128, 0.00996))
    ),
    (Uniform(bits=2, token_group=32), 0.1543, 0),
    (Uniform(bits=2), 0.2508, 0),
    (Uniform(bits=8, channel_group=128), 3.4e-5, 5e-7),
    (Uniform(bits=8, symmetric=True), 4.2e-5, 5e-7),
    (Uniform(bits=4, symmetric=True, channel_group=32), 0.00941, 0),
    (Uniform(bits=4, symmetric=True), 0.01376, 0),
    (Float8(dtype="float8_e4m3fn"), 0.000705, 0),
    (Float8(dtype="float8_e5m2"), 0.0028, 5e-5),
]


@pytest.mark.parametrize(("quantiser", "error", "printed"), FORMATS, ids=lambda part: str(part))
def test_errors_of_formats_on_normal_numbers(quantiser, error, printed):
    numbers = normal(4096, 128)
    restored = through(quantiser, numbers)
    ours = np.sum((numbers - restored) ** 2) / np.sum(numbers**2)
    assert ours == pytest.approx(error, rel=0.02, abs=0.02 * error + printed)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_small_floats_never_become_nan(dtype):
    """Beyond the format's largest, numbers are held there; with a scale a token, none is beyond."""
    largest = float(jnp.finfo(dtype).max)
    assert largest == {"float8_e4m3fn": 448, "float8_e5m2": 57_344}[dtype]
    numbers = np.asarray([[1e30, -1e30, largest, largest * 1.06, 1.0, 0.0, 1e-30, -largest]] * 8, np.float32)
    np.testing.assert_array_equal(
        through(Float8(dtype=dtype), numbers),
        np.clip(np.where(numbers == np.float32(1e-30), 0, numbers), -largest, largest),
    )
    spread = normal(64, 32) * 10.0 ** np.arange(-3, 5).repeat(8)[:, None].astype(np.float32)
    kept = through(Float8(dtype=dtype, scaled=True), spread)
    assert relative_error(spread, kept) < {"float8_e4m3fn": 0.001, "float8_e5m2": 0.004}[dtype]
    assert np.isfinite(through(Float8(dtype=dtype, scaled=True), 1e9 * numbers[:, 2:])).all()


def test_small_floats_settle_on_what_the_device_converts():
    def settled(capability, dtype=""):
        device = None if capability is None else mock.Mock(spec=jax.Device, compute_capability=capability)
        return Float8(dtype=dtype).settle(64, device).dtype

    assert [settled(capability) for capability in ("7.5", "8.0", "8.6")] == ["float8_e5m2"] * 3
    assert [settled(capability) for capability in ("8.9", "9.0", "10.0", "12.1", None)] == ["float8_e4m3fn"] * 5
    assert settled("8.0", "float8_e4m3fn") == "float8_e4m3fn"
    assert Float8().settle(64, jax.devices("cpu")[0]).dtype == "float8_e4m3fn"


def test_exact_is_exact():
    numbers = normal(16, 32)
    np.testing.assert_array_equal(through(Exact("float32"), numbers), numbers)
    rounded = jnp.asarray(numbers).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(through(Exact("bfloat16"), numbers), rounded)


def test_a_clipped_range_holds_what_lies_outside_at_its_ends():
    """A share of 0.5 keeps the middle half of the range from min to max."""
    numbers = np.linspace(-1, 3, 32, dtype=np.float32)[None].repeat(8, 0)
    kept = through(Uniform(bits=8, clip=0.5), numbers)
    np.testing.assert_allclose(kept, np.clip(numbers, 0, 2), rtol=0, atol=1.01 * 2 / 255 / 2 + 1e-3)
    errors = [
        relative_error(rows, through(Uniform(bits=2, clip=clip), rows))
        for rows in [normal(512, 128)]
        for clip in (1.0, 0.8)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_split_keeps_the_parts_apart():
    """The first quarter's scale knows nothing of the rest."""
    numbers = normal(16, 32)
    numbers[:, :8] *= 1000
    first, second = Uniform(bits=8, symmetric=True), LloydMax(bits=4)
    kept = through(Split(share=4, first=first, second=second), numbers)
    np.testing.assert_allclose(kept[:, :8], through(first, numbers[:, :8]), rtol=1e-6)
    np.testing.assert_allclose(kept[:, 8:], through(second, numbers[:, 8:]), rtol=1e-6)


def test_granules_are_token_groups():
    in_tokens = Uniform(bits=2, token_group=32)
    assert [Uniform(bits=2).granule, in_tokens.granule, Uniform(bits=2, channel_group=8).granule] == [1, 32, 1]
    assert Split(share=2, first=in_tokens, second=Uniform(bits=2, token_group=8)).granule == 32


def test_channel_groups_divide_the_head_size():
    assert Uniform(bits=2, channel_group=32).settle(96, None) == Uniform(bits=2, channel_group=32)
    with pytest.raises(UserError, match=r"64 channels do not divide the head size 96\. .* group=32"):
        Uniform(bits=2, channel_group=64).settle(96, None)


QUANTISERS = {
    "float8": Float8(dtype="float8_e4m3fn"),
    "scaled": Float8(dtype="float8_e5m2", scaled=True),
    "exact": Exact("bfloat16"),
    "asymmetric": Uniform(bits=2),
    "symmetric": Uniform(bits=8, symmetric=True),
    "tokens": Uniform(bits=4, token_group=8),
    "channels": Uniform(bits=3, channel_group=8),
    "clipped": Uniform(bits=2, clip=0.9),
    "levels": LloydMax(bits=3),
    "split": Split(share=4, first=LloydMax(bits=3), second=LloydMax(bits=2)),
    "sketch": Sketch(levels=LloydMax(bits=1)),
}


@pytest.mark.parametrize("name", QUANTISERS)
def test_zeros_stay_zeros(name):
    """Whole groups of zeros come back as zeros, and their neighbours are as they were; nothing is NaN."""
    numbers = normal(16, 32)
    numbers[8:] = 0
    kept = through(QUANTISERS[name], numbers)
    assert np.isfinite(kept).all()
    np.testing.assert_array_equal(kept[8:], 0)
    np.testing.assert_allclose(kept[:8], through(QUANTISERS[name], normal(16, 32))[:8], rtol=1e-5, atol=1e-5)


def test_an_unknown_chip_is_no_old_nvidia_chip():
    """Chips of other makers name themselves as they like."""
    device = mock.Mock(spec=jax.Device, compute_capability="gfx942")
    assert Float8().settle(64, device).dtype == "float8_e4m3fn"
