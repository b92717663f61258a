"""How segments are cut into blocks; numbers are tested in test_mosaic_tpu.py and test_mosaic_parts.py."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.coded import Coded, plane_bits
from kernels_pallas.decode_attention import mosaic_floats


def plan(dtype, *, slots, heads, size=128, **given):
    part = Coded(planes=(jax.ShapeDtypeStruct((1, heads, slots, size), dtype),))
    found = mosaic_floats.plan_for((part,), (part,), num_slots=slots, **given)
    assert found.chunk == found.slots
    assert found.together == found.heads
    return found.slots, found.heads


def coded_plan(bits, *, slots, heads, size=128, token_group=1, **given):
    stored = (1, heads)
    planes = tuple(jax.ShapeDtypeStruct((*stored, slots * width // 8, size), jnp.int8) for width in plane_bits(bits))
    own = (slots,) if token_group == 1 else (slots // token_group, size)
    scale = jax.ShapeDtypeStruct((*stored, *own), jnp.float16)
    part = Coded(planes=planes, bits=bits, scale=scale, token_group=token_group)
    found = mosaic_floats.plan_for((part,), (part,), num_slots=slots, **given)
    assert found.slots % found.chunk == 0
    return found.slots, found.heads, found.together


@pytest.mark.parametrize(
    ("dtype", "slots", "heads", "rows", "expected"),
    [
        (jnp.bfloat16, 16384, 8, 8, (4096, 2)),
        (jnp.float32, 16384, 3, 8, (1024, 1)),
        (jnp.bfloat16, 300, 8, 8, (300, 8)),
        (jnp.bfloat16, 300, 8, 128, (300, 1)),
        (jnp.bfloat16, 2048, 8, 8, (2048, 4)),
        (jnp.bfloat16, 3000, 8, 32, (2048, 1)),
        (jnp.float32, 16384, 8, 128, (256, 1)),
    ],
)
def test_blocks_of_floats_are_whole_segments_or_several_heads(dtype, slots, heads, rows, expected):
    assert plan(dtype, rows=rows, slots=slots, heads=heads) == expected


def test_blocks_of_wide_heads_are_shorter():
    assert plan(jnp.bfloat16, rows=8, slots=16384, heads=4, size=576) == (896, 2)


@pytest.mark.parametrize(("heads", "slots"), [(8, 1024), (32, 256), (2, 4096)])
def test_a_step_has_all_heads_where_they_hold_tokens_of_their_own(heads, slots):
    assert plan(jnp.bfloat16, rows=8, slots=16384, heads=heads, shared=False) == (slots, heads)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (2048, 8, 8)),
        ({"bits": 3}, (2048, 8, 8)),
        ({"heads": 1}, (4096, 1, 1)),
        ({"heads": 12}, (4096, 4, 4)),
        ({"heads": 6}, (2048, 6, 6)),
        ({"heads": 20, "shared": False}, (2048, 20, 4)),
        ({"rows": 128}, (512, 8, 8)),
        ({"size": 256}, (1024, 8, 8)),
        ({"slots": 300}, (512, 8, 8)),
        ({"slots": 64, "token_group": 32}, (512, 8, 8)),
        ({"ahead": False}, (2048, 8, 2)),
        ({"ahead": False, "heads": 3}, (4096, 3, 1)),
    ],
)
def test_blocks_of_codes_are_whole_tiles_of_every_array(changes, expected):
    given = {"bits": 4, "slots": 16384, "heads": 8, "rows": 8} | changes
    assert coded_plan(**given) == expected
