"""The named shapes: what a step of each reads, and that the kernel serves them."""

import pytest

from kernels_pallas.decode_attention.cases import CASES

BY_NAME = {case.name: case for case in CASES}


def test_names_are_distinct_and_say_kind_and_group():
    assert len(BY_NAME) == len(CASES)
    assert {"decode_attention.bf16.g8", "decode_attention.int2.g1", "decode_attention.int8int4.g8"} <= BY_NAME.keys()


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("decode_attention.bf16.g8", "TPU v6 lite", 4096 * (2 * 2 * 128 * 2 + 4)),
        ("decode_attention.int8.g4", "TPU v5", 2048 * (8 * (2 * 128 + 4) + 4)),
        ("decode_attention.int4int2.g8", "TPU v6 lite", 4096 * (8 * (64 + 32 + 4) + 4)),
        ("decode_attention.int4int2.g8", "TPU7x", 2048 * (8 * (64 + 32 + 4) + 4)),
        ("decode_attention.bf16pages.g8", "TPU v5 lite", 1024 * (8 * 2 * 128 * 2 + 8 * 4)),
        ("decode_attention.int4pages.g8", "TPU v5", 1024 * (8 * (2 * 64 + 4) + 8 * 4)),
        ("decode_attention.int2kivi.g8", "TPU7x", 2048 * (8 * (2 * 32 + 2 * 4 * 2 + 2 * 4 * 2) + 4)),
    ],
)
def test_a_step_reads_keys_values_scales_and_positions(name, device, expected):
    assert BY_NAME[name].step_bytes(device) == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_serves_them(case):
    for device in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert case.runs_on(device)
    copies = ((1, 8),) if case.pages else ()
    assert case.loop_trips("TPU7x") == copies  # eight heads are written out


@pytest.mark.parametrize(("name", "trips"), [("int3", ((4,),)), ("fp8e4m3fn", ()), ("int4pages", ((1, 8), (4,)))])
def test_codes_that_go_as_floats_loop_over_pairs_of_heads_on_narrow_chips(name, trips):
    assert BY_NAME[f"decode_attention.{name}.g8"].loop_trips("TPU v5 lite") == trips


@pytest.mark.parametrize(("device", "trips"), [("TPU v5 lite", 6), ("TPU v6 lite", 2)])
def test_integers_loop_over_heads_that_share_passes(device, trips):
    assert BY_NAME["decode_attention.int4.g8"].loop_trips(device) == ((trips,),)
