"""How floats are cut into blocks; their numbers are tested with the others in test_mosaic_tpu.py."""

import jax.numpy as jnp
import pytest

from kernels_pallas.decode_attention import mosaic_floats


@pytest.mark.parametrize(
    ("dtype", "slots", "heads", "rows", "expected"),
    [
        (jnp.bfloat16, 16384, 8, 8, (1024, 4)),
        (jnp.float32, 16384, 3, 8, (512, 1)),
        (jnp.bfloat16, 300, 8, 8, (300, 8)),
        (jnp.bfloat16, 300, 8, 128, (300, 1)),
        (jnp.bfloat16, 3000, 8, 32, (1024, 1)),
    ],
)
def test_blocks_are_whole_segments_or_several_heads(dtype, slots, heads, rows, expected):
    found = mosaic_floats.plan_for(dtype, rows=rows, num_slots=slots, num_heads=heads)
    assert (found.slots, found.heads) == expected


def test_blocks_of_wide_heads_are_shorter():
    found = mosaic_floats.plan_for(jnp.bfloat16, rows=8, num_slots=16384, num_heads=4, width=576)
    assert (found.slots, found.heads) == (128, 4)


@pytest.mark.parametrize(("heads", "slots"), [(8, 512), (32, 128), (2, 2048)])
def test_a_step_has_all_heads_where_they_hold_tokens_of_their_own(heads, slots):
    found = mosaic_floats.plan_for(jnp.bfloat16, rows=8, num_slots=16384, num_heads=heads, shared=False)
    assert (found.slots, found.heads) == (slots, heads)
