"""Every layout of codes through the float matrix unit, against the reference on the same arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import mosaic_floats, mosaic_parts, mosaic_tpu, reference
from tests.kernels_pallas.decode_attention.parts import FORMS, LEVELS, made, of_bits, of_floats
from tests.kernels_pallas.decode_attention.running import assert_equal, finished

TOLERANCE = 5e-4  # of the largest number: codes are exact, rows are two bfloat16
ROUNDED = 4e-3  # numbers are rounded to bfloat16


@pytest.fixture(autouse=True)
def floats_only(monkeypatch):
    """A chip that multiplies no integers, and blocks of few slots."""
    monkeypatch.setattr(mosaic_tpu, "_FLOATS_ONLY", ("cpu",))
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 256)


def compare(segment, query_positions, tolerance):
    scale = segment.queries.shape[3] ** -0.5
    assert mosaic_tpu.unsupported(segment, "TPU7x") is None
    ours = finished(mosaic_tpu.walk(segment, query_positions, scale, interpret=True))
    assert_equal(ours, finished(reference.walk(segment, query_positions, scale)), tolerance)
    return ours


def operands(monkeypatch, segment, *dtypes):
    """A chip that takes some floats of 8 bits beside bfloat16, and what keys and values go to its matrix unit as."""
    monkeypatch.setattr(mosaic_tpu, "_NATIVE", {"cpu": dtypes})
    plan = mosaic_tpu.plan_for(segment, 1.0, "cpu")
    return [layout.dtype for layout in plan.keys + plan.values]


@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2, 1])
def test_codes_with_a_scale_a_token(bits):
    part = of_bits(bits)
    compare(*made(part, part), TOLERANCE)


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("form", FORMS)
def test_scales_and_offsets_lie_as_they_like(form, bits):
    part = of_bits(bits, **FORMS[form])

    compare(*made(part, part), ROUNDED if "by channel" in form else TOLERANCE)


@pytest.mark.parametrize("narrow", [(), ("cpu",)])
@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_levels_of_a_table(bits, narrow, monkeypatch):
    """Bit for bit as bfloat16 has them, on chips that look up 16 bits and on those that look up 32."""
    monkeypatch.setattr(mosaic_tpu, "_NARROW", narrow)
    levels = tuple(float(jnp.bfloat16(level)) for level in LEVELS[:: 16 >> bits])

    part = of_bits(bits, levels=levels)

    compare(*made(part, part, size=80 if bits == 3 else 256, slots=256), TOLERANCE)


@pytest.mark.parametrize("narrow", [(), ("cpu",)])
def test_a_table_over_heads_that_end_within_a_tile(narrow, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_NARROW", narrow)

    part = of_bits(4, levels=LEVELS)

    compare(*made(part, part, size=192, slots=256), ROUNDED)  # of its levels


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_floats_of_8_bits(dtype):
    part = of_floats(dtype)

    compare(*made(part, part), TOLERANCE)


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
@pytest.mark.parametrize("form", FORMS)
def test_codes_of_4_bits_at_most_lose_nothing_as_floats_of_8_bits(form, bits, monkeypatch):
    """Scales of channels are multiplied with keys and values before, which takes 16 bits."""
    part = of_bits(bits, **FORMS[form])
    segment, positions = made(part, part)
    tolerance = ROUNDED if "by channel" in form else TOLERANCE
    assert operands(monkeypatch, segment) == ["bfloat16"] * 2
    wide = compare(segment, positions, tolerance)
    found = operands(monkeypatch, segment, "float8_e4m3fn", "float8_e5m2")
    assert found == ["bfloat16" if "by channel" in form else "float8_e4m3fn"] * 2
    assert_equal(compare(segment, positions, tolerance), wide, 1e-5)  # codes of 2 bits are counted from the lowest


@pytest.mark.parametrize("part", [of_bits(8), of_bits(5), of_bits(4, levels=LEVELS)])
def test_what_8_bits_do_not_hold_goes_as_bfloat16(part, monkeypatch):
    assert operands(monkeypatch, made(part, part)[0], "float8_e4m3fn", "float8_e5m2") == ["bfloat16"] * 2


@pytest.mark.parametrize(
    ("dtype", "native", "operand"),
    [
        ("float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e5m2", "float8_e5m2"),
        ("float8_e4m3fn", "float8_e4m3b11fnuz", "float8_e4m3b11fnuz"),
        ("float8_e5m2", "float8_e4m3b11fnuz", "bfloat16"),
    ],
)
def test_floats_of_8_bits_as_they_are_or_of_another_bias(dtype, native, operand, monkeypatch):
    segment, positions = made(of_floats(dtype), of_floats(dtype))
    wide = compare(segment, positions, TOLERANCE)
    assert operands(monkeypatch, segment, native) == [operand] * 2
    assert_equal(compare(segment, positions, TOLERANCE), wide, 1e-6)


def test_bytes_stand_for_a_sixteenth_where_the_bias_is_11():
    every = np.arange(256, dtype=np.uint8)
    words = mosaic_parts.without_signs_of_zero(jnp.asarray(every.view(np.int32)[None]))
    found = 16 * np.asarray(np.asarray(words).view(jnp.float8_e4m3b11fnuz)[0], np.float32)
    expected = np.asarray(every.view(jnp.float8_e4m3fn), np.float32)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[is_number], expected[is_number])


def test_a_scale_may_be_anything_that_a_float16_can_be():
    odd = jnp.asarray([0.0, 2.0**-24, -0.5, 2.0**-15, 1.0, 65504.0], jnp.float16)
    found = mosaic_parts.of_float16(odd.view(jnp.int16))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(odd, np.float32))


def test_two_bfloat16_come_to_a_float32():
    numbers = jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)
    high, low = (np.asarray(one, np.float64) for one in mosaic_parts.split(numbers))
    assert np.abs((high + low) / np.asarray(numbers, np.float64) - 1).max() < 2.0**-16
