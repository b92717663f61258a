"""How codes are cut into blocks."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import mosaic_plan


def part(bits, *, heads, slots, size):
    plane = jax.ShapeDtypeStruct((1, heads, slots * bits // 8, size), jnp.int8)
    return Coded(planes=(plane,), scale=jax.ShapeDtypeStruct((1, heads, slots), jnp.float16), bits=bits)


@pytest.mark.parametrize(
    ("bits", "slots", "heads", "rows", "size", "expected"),
    [
        ((4, 4), 16384, 8, 8, 128, (4096, 8, 2, 256)),
        ((8, 4), 16384, 8, 8, 128, (2048, 8, 2, 256)),
        ((2, 2), 16384, 32, 8, 128, (8192, 8, 2, 256)),
        ((4, 4), 16384, 1, 8, 128, (8192, 1, 1, 256)),
        ((4, 4), 16384, 8, 8, 64, (4096, 8, 1, 256)),
        ((4, 4), 16384, 8, 8, 256, (2048, 8, 1, 256)),
        ((4, 4), 300, 8, 8, 128, (512, 8, 2, 256)),
        ((8, 8), 128, 12, 8, 128, (128, 4, 2, 128)),
        ((4, 4), 16384, 8, 64, 128, (1024, 8, 2, 256)),
    ],
)
def test_blocks_fill_two_mebibytes_in_a_program_of_bounded_length(bits, slots, heads, rows, size, expected):
    keys, values = (part(one, heads=heads, slots=slots, size=size) for one in bits)
    found = mosaic_plan.plan_for(keys, values, rows=rows, biased=False, one_position=True, wide=True, num_slots=slots)
    assert (found.slots, found.heads, found.beside, found.chunk) == expected
    narrow = mosaic_plan.plan_for(keys, values, rows=rows, biased=False, one_position=True, wide=False, num_slots=slots)
    assert (narrow.beside, narrow.chunk) == (1, 128)


def test_levels_become_bytes_that_are_off_by_little():
    levels = (-2.7326, -2.069, -1.6181, -1.2562, -0.9424, -0.6568, -0.3881, -0.1284)
    levels += tuple(-level for level in levels[::-1])  # Lloyd-Max of the normal
    found, step = mosaic_plan.as_bytes(levels)
    assert found == tuple(-level for level in found[::-1])
    assert 96 <= max(found) <= 127
    assert max(abs(byte * step - level) for byte, level in zip(found, levels, strict=True)) < 0.5 * step
    assert sum((byte * step - level) ** 2 for byte, level in zip(found, levels, strict=True)) / 16 < 2.5e-5
    assert mosaic_plan.as_bytes(None) == (None, 1.0)
