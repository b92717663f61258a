"""Beside what `test_kernels.py` asks of all kernels: its steps and pieces, and what the compiler for TPUs takes."""

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.slots import mosaic_tpu
from kernels_pallas.slots.cases import CASES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.kernels_pallas.slots.drawn import assert_same, coded, drawn
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"


@pytest.mark.parametrize(("bits", "slots"), [(1, 256), (2, 384), (3, 896), (4, 64), (8, 2112)])
def test_blocks_and_pieces_that_are_not_whole(bits, slots):
    """A block alone, pieces that are not whole, and a last block that is not."""
    parts = (coded(bits, slots),)
    assert mosaic_tpu.unsupported(parts, 24, 1, CHIP) is None
    assert_same(mosaic_tpu, parts, (coded(bits, 24, seed=2),), drawn(slots, 24))


def test_more_tokens_than_lanes_and_none():
    new = (coded(4, 136, seed=2),)
    for slots in (drawn(256, 136), jnp.full((2, 2, 136), -1, jnp.int32)):
        assert_same(mosaic_tpu, (coded(4, 256),), new, slots)


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        assert_same(
            mosaic_tpu, (coded(4, 64, size=128),), (coded(4, 8, size=128, seed=2),), drawn(64, 8), interpret=parameters
        )
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_bytes_that_fill_no_tiles_are_not_served():
    parts = (coded(4, 528, size=2),)
    assert mosaic_tpu.unsupported(parts, 8, 1, CHIP) == "264 bytes a channel do not fill tiles of 32"


@pytest.mark.parametrize(
    ("num_bytes", "block", "piece"), [(32, 32, 32), (96, 96, 32), (1024, 1024, 128), (1056, 1024, 128), (112, 112, 112)]
)
def test_steps_and_pieces(num_bytes, block, piece):
    assert mosaic_tpu.block_of(num_bytes) == block
    assert mosaic_tpu.piece_of(block) == piece


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for(topology):
    assert compile_cases("kernels_pallas.slots.cases", topology) == [case.name for case in CASES]
