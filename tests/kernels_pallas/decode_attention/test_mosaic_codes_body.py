"""Pieces of the kernel for codes; its numbers are tested with the others in test_mosaic_tpu.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas._tpu import of_half
from kernels_pallas.decode_attention import mosaic_codes_body


def test_float16_is_read_from_its_bits():
    bits = np.arange(0x7C00, dtype=np.int32)  # all that are finite and not negative
    read = of_half(jnp.asarray(bits << 13))
    np.testing.assert_array_equal(read, bits.astype(np.uint16).view(np.float16).astype(np.float32))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_nth_lane_of_several_tiles(count):
    tiles = jnp.arange(count * 128, dtype=jnp.int32).reshape(count, 1, 128)
    lane = jnp.arange(128, dtype=jnp.int32)[None]
    by_class = jax.jit(mosaic_codes_body._by_class)(list(tiles))
    for first in range(count):
        found = mosaic_codes_body._every(list(tiles), first, lane)
        np.testing.assert_array_equal(found[0], np.arange(first, count * 128, count))
        np.testing.assert_array_equal(by_class[first], found)
