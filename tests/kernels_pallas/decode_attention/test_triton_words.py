"""Codes and 8-bit floats in pairs of channels: every recipe on every code."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, pack, plane_bits
from kernels_pallas.decode_attention import triton_words
from kernels_pallas.decode_attention.triton_read import num_fields


def elements_of(part, entry):
    """A field's int16 tiles, as the kernel loads them."""
    fields = num_fields(part)
    widths = plane_bits(part.bits) if part.bits else (8,)
    return tuple(
        plane.view(jnp.int16).reshape(-1, fields * width // 8, plane.shape[-1] // 2)[:, entry * width // 8]
        for plane, width in zip(part.planes, widths, strict=True)
    )


def read(part):
    """All numbers, `tokens channels`."""
    fields = num_fields(part)
    found = np.zeros((part.planes[0].shape[0] * 8 // (plane_bits(part.bits) if part.bits else (8,))[0], 16), np.float32)
    for entry in range(fields):
        for parity in (0, 1):
            recipe = triton_words.recipe_for(part, entry, parity)
            numbers = triton_words.numbers(elements_of(part, entry), recipe, interpret=True)
            assert numbers.dtype == jnp.float16
            found[entry::fields, parity::2] = np.asarray(numbers)
    return found


def codes_of(bits, generator):
    half = 1 << (bits - 1)
    return generator.integers(-half, half, (64, 16))


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_exact_whatever_they_count_from(bits):
    codes = codes_of(bits, np.random.default_rng(bits))
    for shift in (0.0, 0.5, float(1 << (bits - 1))):
        part = Coded(planes=pack(jnp.asarray(codes), bits), bits=bits, shift=shift)
        np.testing.assert_array_equal(read(part) / triton_words.UNIT, codes + shift)


@pytest.mark.parametrize("bits", range(1, 5))
def test_levels_of_a_table_are_found(bits):
    generator = np.random.default_rng(bits)
    codes, levels = codes_of(bits, generator), np.sort(generator.normal(size=1 << bits)).astype(np.float16)
    part = Coded(planes=pack(jnp.asarray(codes), bits), bits=bits, levels=tuple(map(float, levels)))
    np.testing.assert_array_equal(read(part), levels[codes + (1 << (bits - 1))])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_all_eight_bit_floats_are_exact(name):
    bytes_ = jnp.arange(256, dtype=jnp.uint8).view(jnp.int8).reshape(16, 16)
    expected = np.asarray(bytes_.view(name).astype(jnp.float32))
    found = read(Coded(planes=(bytes_,), dtype=name))
    counts = ~np.isnan(expected)
    assert counts.sum() >= 250
    np.testing.assert_array_equal(found[counts], expected[counts])
    assert name == "float8_e5m2" or np.isfinite(found).all()


def test_no_more_shifts_than_there_have_to_be():
    """Of 4 bits, one shift brings both odd fields where the even ones are."""

    def shifts(bits):
        part = Coded(planes=tuple(jnp.zeros((64, 16), jnp.int8) for _ in plane_bits(bits)), bits=bits)
        recipes = [
            triton_words.recipe_for(part, entry, parity) for entry in range(num_fields(part)) for parity in (0, 1)
        ]
        return {move.up for recipe in recipes for move in recipe.moves if move.up}

    assert shifts(8) == shifts(4) == shifts(2) == {-8}
    assert len(shifts(3)) < 2 * 8 * 2


def test_what_has_no_recipe():
    plane = jnp.zeros((64, 16), jnp.int8)
    assert triton_words.possible(Coded(planes=(plane,), bits=8))
    assert triton_words.possible(Coded(planes=(plane,), dtype="float8_e5m2"))
    assert not triton_words.possible(Coded(planes=(plane.astype(jnp.bfloat16),)))
    assert not triton_words.possible(Coded(planes=(plane, plane), bits=5, levels=tuple(map(float, range(32)))))
