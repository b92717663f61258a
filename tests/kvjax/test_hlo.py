"""Bytes that a compiled program moves, from its text."""

import re

import jax
import jax.numpy as jnp
import pytest

from kvjax.hlo import movements, parse_shape

TEXT = """\
HloModule jit_step, is_scheduled=true

%sliced (param_0.1: bf16[64,128], param_1: s32[]) -> bf16[8,128] {
  %param_0.1 = BIG parameter(0)
  %bitcast.7 = BIG bitcast(%param_0.1)
  %param_1 = INDEX parameter(1)
  ROOT %dynamic-slice.1 = SMALL dynamic-slice(%bitcast.7, %param_1, %param_1), dynamic_slice_sizes={8,128}
}

%updated (param_0.2: bf16[64,128], param_1.2: bf16[8,128], param_2: s32[]) -> bf16[64,128] {
  %param_0.2 = BIG parameter(0)
  %param_1.2 = SMALL parameter(1)
  %param_2 = INDEX parameter(2)
  ROOT %dynamic-update-slice.1 = BIG dynamic-update-slice(%param_0.2, %param_1.2, %param_2, %param_2)
}

%body (loop.1: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %loop.1 = (INDEX, BIG) parameter(0)
  %get-tuple-element.1 = INDEX get-tuple-element(%loop.1), index=0
  %get-tuple-element.2 = BIG get-tuple-element(%loop.1), index=1
  %slice.9 = SMALLV slice(%get-tuple-element.2), slice={[0:8], [0:128]}
  ROOT %tuple.1 = (INDEX, BIG) tuple(%get-tuple-element.1, %get-tuple-element.2)
}

%condition (loop.2: (s32[], bf16[64,128])) -> pred[] {
  %loop.2 = (INDEX, BIG) parameter(0)
  %constant.1 = INDEX constant(16)
  %get-tuple-element.3 = INDEX get-tuple-element(%loop.2), index=0
  ROOT %compare.1 = pred[]{:T(512)S(1)} compare(%get-tuple-element.3, %constant.1), direction=LT
}

%stays (given.1: bf16[64,128]) -> bf16[64,128] {
  ROOT %given.1 = BIG parameter(0)
}

%round (given.2: bf16[64,128]) -> bf16[64,128] {
  %given.2 = BIG parameter(0)
  ROOT %copy.1 = BIG copy(%given.2)
}

ENTRY %main (keys: bf16[64,128], weights: bf16[64,128], at: s32[]) -> bf16[64,128] {
  %keys = BIG parameter(0)
  %weights = BIG parameter(1)
  %at = s32[]{:T(128)S(1)} parameter(2)
  %copy-start = (BIGV, BIG, u32[]{:S(2)}) copy-start(%weights)
  %copy-done = BIGV copy-done(%copy-start)
  %product = BIGV fusion(%copy-done), kind=kLoop, calls=%round
  %conditional = BIG conditional(%at, %keys, %keys), branch_computations={%stays, %round}
  %piece = SMALLV fusion(%keys, %at), kind=kLoop, calls=%sliced
  %put = BIG fusion(%keys, %piece, %at), kind=kLoop, calls=%updated
  %tuple.5 = (INDEX, BIG) tuple(%at, %put)
  %while = (INDEX, BIG) while(%tuple.5), condition=%condition, body=%body
  %run.1 = (f32[1,128]{1,0:T(1,128)S(1)}, /*index=1*/f32[64]{0:T(128)}) custom-call(%at, %put, %put), KERNEL
  ROOT %concat = BIG custom-call(%put), custom_call_target="ConcatBitcast"
}
"""

for _word, _shape in {
    "BIG": "bf16[64,128]{1,0:T(8,128)(2,1)SPACE}",
    "SMALL": "bf16[8,128]{1,0:T(8,128)(2,1)SPACE}",
    "INDEX": "s32[]{:T(128)}",
    "KERNEL": 'custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention/pallas_call"}',
}.items():
    TEXT = TEXT.replace(f"{_word}V", _shape.replace("SPACE", "S(1)")).replace(_word, _shape.replace("SPACE", ""))

ARRAY, PIECE, TILE = 64 * 128 * 2, 8 * 128 * 2, 128 * 4


@pytest.mark.parametrize(
    ("shape", "sizes", "in_hbm"),
    [
        ("f32[3,5]", [60], [True]),
        ("s32[16,1]{1,0:T(8,128)}", [16 * 128 * 4], [True]),
        ("s32[16,1,300]{2,1,0:T(1,128)}", [16 * 384 * 4], [True]),
        ("bf16[5,16]{0,1:T(8,128)(2,1)S(1)}", [16 * 128 * 2], [False]),
        ("s4[64,128]{1,0:T(8,128)(8,1)E(4)}", [64 * 64], [True]),
        ("(pred[], /*index=1*/f8e4m3fn[8]{0:S(2)})", [1, 8], [True, False]),
    ],
)
def test_arrays_have_the_sizes_of_their_tiles(shape, sizes, in_hbm):
    arrays = parse_shape(shape)
    assert [array.size for array in arrays] == sizes
    assert [array.in_hbm for array in arrays] == in_hbm


def test_each_instruction_counts_what_it_touches_in_the_large_memory():
    moved = {one.name: (one.opcode, one.read, one.written, one.branch) for one in movements(TEXT)}
    assert moved == {
        "copy-start": ("copy-start", ARRAY, 0, False),
        "copy.1": ("copy", ARRAY, ARRAY, True),
        "piece": ("fusion", PIECE, 0, False),
        "put": ("fusion", 0, PIECE, False),
        "slice.9": ("slice", 16 * PIECE, 0, False),
        "run.1": ("kernel", ARRAY, TILE, False),
    }
    assert next(one.source for one in movements(TEXT) if one.opcode == "kernel") == "jit(step)/attention/pallas_call"


def test_what_runs_where_a_condition_fails_is_no_branch():
    """A copy beside the round is made in each step."""
    swapped = TEXT.replace("{%stays, %round}", "{%round, %stays}")
    assert [one.branch for text in (TEXT, swapped) for one in movements(text) if one.name == "copy.1"] == [True, False]


def test_a_loop_without_a_bound_goes_over_all_of_what_it_slices():
    text = TEXT.replace("constant(16)", "get-tuple-element(%loop.2), index=0")
    assert {one.name: one.read for one in movements(text)}["slice.9"] == ARRAY


def test_a_loop_that_carries_its_condition_is_a_branch():
    """It runs once or never."""
    carried = "ROOT %compare.1 = pred[]{:T(512)S(1)} get-tuple-element(%loop.2), index=0"
    text = re.sub(r"ROOT %compare\.1 .*", carried, TEXT).replace("  %constant.1 = INDEX constant(16)\n", "")
    (found,) = [one for one in movements(text) if one.name == "slice.9"]
    assert (found.branch, found.read) == (True, PIECE)


def test_the_text_of_this_machine_is_read_too():
    compiled = jax.jit(lambda x: x @ x + 1).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    moved = movements(compiled.as_text())
    assert sum(one.moved for one in moved) >= 3 * 64 * 64 * 4
