"""Codes in memory: bytes as documented, what is read back, and blocks of slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import (
    Coded,
    Rotated,
    alignment,
    look_up,
    pack,
    plane_bits,
    read_parts,
    slice_parts,
    unpack,
)
from kvjax.rope import Llama3Scaling, Rope, YarnScaling, rotate, turns_at

BITS = range(1, 9)
# First 16 codes of the golden vector of tests/kvjax/stages/test_levels.py, the most negative level counted as 0.
GOLDEN_CODES = {
    2: [2, 1, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 2, 2, 0, 3],
    3: [5, 3, 1, 1, 2, 3, 5, 4, 5, 5, 4, 6, 4, 5, 1, 7],
    4: [11, 7, 2, 3, 4, 6, 10, 8, 11, 10, 8, 12, 8, 10, 3, 14],
}
GOLDEN_BYTES = {2: ["06A5EACA"], 3: ["5D1E85D4", "C1BF"], 4: ["7B32648AABC8A8E3"]}


def random_codes(bits, *, shape=(2, 3, 32, 6), seed=0):
    half = 1 << (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_back(bits):
    """Two's complement of every width, whatever the integer dtype, with the unused high bits ignored."""
    codes = random_codes(bits)
    for given in (codes, codes.astype(np.int32) + (5 << bits)):
        restored = unpack(pack(jnp.asarray(given), bits), bits)
        assert restored.dtype == jnp.int8
        np.testing.assert_array_equal(restored, codes)


@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_take_their_bits_and_no_more(bits):
    """S bits/8 bytes a channel, in planes of 8, 4, 2 and 1 bits that add up, the low bits' plane first."""
    codes = random_codes(bits)
    planes = pack(jnp.asarray(codes), bits)
    assert sum(plane.nbytes for plane in planes) * 8 == codes.size * bits
    widths = plane_bits(bits)
    assert sum(widths) == bits
    assert [plane.shape[2] * 8 for plane in planes] == [32 * width for width in widths]
    assert plane_bits(3) == (2, 1)
    assert plane_bits(7) == (4, 2, 1)


@pytest.mark.parametrize("bits", GOLDEN_CODES)
def test_bytes_are_as_documented(bits):
    """Neighbouring tokens share bytes, lowest bits first; 3 bits are a plane of 2 and a plane of 1."""
    codes = jnp.asarray(GOLDEN_CODES[bits], jnp.int32)[:, None]  # tokens, one channel
    planes = pack(codes, bits)
    assert [np.asarray(plane).tobytes().hex().upper() for plane in planes] == GOLDEN_BYTES[bits]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("mirrored", [True, False])
def test_look_up_is_plain_indexing(bits, mirrored):
    levels = np.sort(normal(1 << bits, seed=bits)).astype(np.float64)
    levels = (levels - levels[::-1]) / 2 if mirrored else levels
    codes = np.arange(-(1 << bits) // 2, (1 << bits) // 2, dtype=np.int8)
    found = look_up(jnp.asarray(codes), tuple(levels.tolist()))
    np.testing.assert_array_equal(found, levels.astype(np.float32))


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_scales_of_a_token(bits):
    """`B K S`: x = scale (code + shift) + offset."""
    codes, scale, offset = random_codes(bits), normal(2, 3, 32), normal(2, 3, 32, seed=1)
    part = Coded(
        planes=pack(jnp.asarray(codes), bits),
        scale=jnp.asarray(scale),
        offset=jnp.asarray(offset),
        bits=bits,
        shift=0.5,
    )
    expected = scale[..., None] * (codes + np.float32(0.5)) + offset[..., None]
    np.testing.assert_allclose(part.read(), expected, rtol=1e-6, atol=1e-6)
    assert (part.num_slots, part.num_heads) == (32, 3)


def test_scales_of_a_channel_group_of_a_token():
    """`B K C S`, tokens last: neighbouring channels share a scale; levels are looked up."""
    codes, scale, offset = random_codes(2), normal(2, 3, 2, 32), normal(2, 3, 2, 32, seed=1)
    levels = (-1.5, -0.25, 0.5, 2.0)
    part = Coded(
        planes=pack(jnp.asarray(codes), 2),
        scale=jnp.asarray(scale, jnp.float16),
        offset=jnp.asarray(offset, jnp.float16),
        bits=2,
        levels=levels,
    )
    number = np.asarray(levels, np.float32)[codes + 2]
    expected = np.empty_like(number)
    for channel in range(6):
        group = channel // 3
        wide = [array[:, :, group].astype(np.float16).astype(np.float32) for array in (scale, offset)]
        expected[..., channel] = wide[0] * number[..., channel] + wide[1]
    np.testing.assert_allclose(part.read(), expected, rtol=1e-6, atol=1e-6)
    assert part.read().dtype == jnp.float32


def test_scales_of_a_channel_of_a_token_group():
    """`B K S/t R`: neighbouring tokens of one channel share a scale."""
    codes, scale, offset = random_codes(4), normal(2, 3, 4, 6), normal(2, 3, 4, 6, seed=1)
    part = Coded(
        planes=pack(jnp.asarray(codes), 4),
        scale=jnp.asarray(scale),
        offset=jnp.asarray(offset),
        bits=4,
        shift=8.0,
        token_group=8,
    )
    expected = np.empty((2, 3, 32, 6), np.float32)
    for token in range(32):
        group = token // 8
        expected[:, :, token] = scale[:, :, group] * (codes[:, :, token] + np.float32(8)) + offset[:, :, group]
    np.testing.assert_allclose(part.read(), expected, rtol=1e-6, atol=1e-6)
    assert part.alignment == 8


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_bytes_of_small_floats_are_read_as_floats(dtype):
    small = jnp.asarray(normal(1, 2, 5, 4)).astype(dtype)
    part = Coded(planes=(small.view(jnp.int8),), dtype=dtype)
    np.testing.assert_array_equal(part.read(), small.astype(jnp.float32))
    assert (part.num_slots, part.alignment) == (5, 1)
    plain = Coded(planes=(small.astype(jnp.bfloat16),))
    np.testing.assert_array_equal(plain.read(), part.read())


def every_layout():
    """One part of each kind, 64 slots, 2 heads of 8 numbers."""
    codes = {bits: jnp.asarray(random_codes(bits, shape=(2, 2, 64, 8))) for bits in (2, 3, 4)}
    floats = Coded(planes=(jnp.asarray(normal(2, 2, 64, 8)),))
    by_token = Coded(planes=pack(codes[3], 3), scale=jnp.asarray(normal(2, 2, 64)), bits=3)
    by_channels = Coded(
        planes=pack(codes[2], 2),
        scale=jnp.asarray(normal(2, 2, 4, 64)),
        offset=jnp.asarray(normal(2, 2, 4, 64, seed=1)),
        bits=2,
    )
    by_tokens = Coded(planes=pack(codes[4], 4), scale=jnp.asarray(normal(2, 2, 4, 8)), bits=4, token_group=16)
    turned = Rotated(
        parts=(by_token,), basis=None, mean=None, frequencies=tuple(Rope(head_size=8).frequencies().tolist())
    )
    return {"floats": floats, "token": by_token, "channels": by_channels, "tokens": by_tokens, "rotated": turned}


@pytest.mark.parametrize("kinds", [*([kind] for kind in every_layout()), ["tokens", "token", "floats"]])
@pytest.mark.parametrize("traced", [False, True])
def test_slicing_the_parts_is_slicing_the_numbers(kinds, traced):
    parts = tuple(every_layout()[kind] for kind in kinds)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32) * 3, (2, 1, 64))
    start, size = 16, 32
    assert start % alignment(parts) == 0

    @jax.jit
    def read(start_inside):
        block = slice_parts(parts, start_inside if traced else start, size)
        assert {part.num_slots for part in block} == {size}
        return read_parts(block, positions[:, :, start : start + size]), read_parts(parts, positions)

    ours, whole = read(start)
    np.testing.assert_array_equal(ours, whole[:, :, start : start + size])


def test_the_alignment_is_that_of_bytes_and_of_groups():
    layouts = every_layout()
    assert {kind: part.alignment for kind, part in layouts.items()} == {
        "floats": 1,
        "token": 8,  # a plane of single bits
        "channels": 4,
        "tokens": 16,
        "rotated": 8,
    }
    assert alignment((layouts["token"], layouts["channels"])) == 8


ROPES = {
    "plain": Rope(head_size=16),
    "llama3": Rope(
        head_size=16,
        scaling=Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=512),
    ),
    "yarn": Rope(head_size=16, scaling=YarnScaling(factor=4.0, original_max_positions=512)),
}


def turned(rope, keys, positions):
    """What models do to keys: `B K S D` in, the same out."""
    return jnp.swapaxes(rotate(jnp.swapaxes(jnp.asarray(keys), 1, 2), turns_at(rope, positions)), 1, 2)


def rotated(rope, numbers, basis=None, mean=None):
    frequencies = tuple(rope.frequencies().tolist())
    part = Coded(planes=(jnp.asarray(numbers),))
    return Rotated(parts=(part,), basis=basis, mean=mean, frequencies=frequencies, factor=rope.attention_factor())


@pytest.mark.parametrize("name", ROPES)
def test_keys_from_before_rope_are_turned_when_read(name):
    """The same turn as models give, the attention factor of YaRN included, at positions in any order."""
    rope, keys = ROPES[name], normal(2, 3, 40, 16)
    positions = jnp.asarray(np.random.default_rng(1).permutation(80).reshape(2, 40), jnp.int32)
    part = rotated(rope, keys)
    np.testing.assert_allclose(part.read(positions[:, None]), turned(rope, keys, positions), rtol=0, atol=1e-5)
    assert (part.num_heads, part.num_slots, part.alignment) == (3, 40, 1)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shared", [1, 2])
def test_basis_and_mean_come_before_the_turn(by_row, shared):
    """Keys = numbers basis + mean, where `shared` heads have the same numbers and each its own basis."""
    rope, numbers = ROPES["plain"], normal(2, 4 // shared, 24, 6)
    rows = (2,) if by_row else ()
    basis, mean = normal(*rows, 4, 6, 16, seed=1), normal(*rows, 4, 16, seed=2)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), (2, 24))
    keys = np.empty((2, 4, 24, 16), np.float32)
    for row, head in np.ndindex(2, 4):
        index = (row, head) if by_row else (head,)
        keys[row, head] = numbers[row, head // shared] @ basis[index] + mean[index]
    part = rotated(rope, numbers, jnp.asarray(basis), jnp.asarray(mean))
    np.testing.assert_allclose(part.read(positions[:, None]), turned(rope, keys, positions), rtol=0, atol=2e-5)
    assert part.num_heads == 4
