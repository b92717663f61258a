"""The schedule of the kernels: how the compiler's dump is read, and that the committed table still holds."""

import dataclasses

import pytest

from kernels_pallas import schedule
from tests.libtpu import needs_libtpu

DEPTHS = [0, 1, 1, 2, 3, 3, 1, 2, *[1] * 12, 2, 0]  # the 1 between two 2 is control
SPILLS = [1, 1, 0, 0, 1, 0, 0, 1, *[0] * 12, 1, 0]


@pytest.mark.parametrize(
    ("trips", "expected"),
    [
        ((), (14, 1)),
        (((32, 4),), (14 + 3 * 32 + 2 * 128, 1 + 128 + 32)),
        (((32, 4), (10,)), (14 + 3 * 32 + 2 * 128 + 10, 1 + 128 + 32 + 10)),
    ],
)
def test_bundles_of_the_grid_loop_count_and_those_of_the_first_loops_within(trips, expected, tmp_path):
    lines = [f"     0x{index:x} LB: {'> ' * depth}{{ {index} }}" for index, depth in enumerate(DEPTHS)]
    (tmp_path / "3-decode_attention.1-77-final_bundles.txt").write_text("\n".join(lines))
    use = ["a comment", "VALU, VSTORE:SPILL", "4, 1", "another", *[f"1 {spilled}" for spilled in SPILLS]]
    name = "3-decode_attention.1-78-final_hlo-static-per-bundle-utilization.txt"
    (tmp_path / name).write_text("\n".join(use))
    assert schedule.read_schedule(str(tmp_path), "decode_attention", trips=trips) == expected


def test_an_unknown_case_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["schedule", "--chip=v6e", "--cases=decode_attention.int7.g8"])
    assert schedule.main() == 2
    assert capsys.readouterr().err.startswith(
        "error: Unknown case 'decode_attention.int7.g8'. Known: decode_attention."
    )


def test_the_table_has_every_chip_and_case():
    wanted = {
        (chip, case.name)
        for chip, facts in schedule.CHIPS.items()
        for case in schedule.CASES.values()
        if case.runs_on(facts.device)
    }
    assert schedule.read().keys() == wanted
    assert next(iter(schedule.read().values())).keys() == {field.name for field in dataclasses.fields(schedule.Row)}


def test_readme_repeats_the_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["schedule", "--markdown"])
    assert schedule.main() == 0
    assert capsys.readouterr().out in schedule.TABLE.with_name("README.md").read_text(encoding="utf-8")


@needs_libtpu
@pytest.mark.parametrize(
    ("chip", "case"),
    [
        ("v5e", "decode_attention.int8.g8"),
        ("v6e", "decode_attention.int4.g8"),
        ("v5p", "decode_attention.int2.g8"),
        ("tpu7x", "decode_attention.bf16.g8"),
        ("v6e", "decode_attention.bf16.g1"),
        ("v6e", "decode_attention.int4table.g8"),
        ("v5e", "decode_attention.int3table.g8"),
        ("tpu7x", "decode_attention.int4.g8"),
        ("v6e", "decode_attention.int2kivi.g8"),
        ("v5e", "encode.half4.s8192"),
        ("v6e", "select.s2176"),
        ("v5p", "slots.put4.s2048"),
    ],
)
def test_the_table_still_holds(chip, case):
    """Within a tenth; every kind, on every chip once."""
    row, written = schedule.measure(case, chip), schedule.read()[chip, case]
    if (row.jax, row.libtpu) != (written["jax"], written["libtpu"]):
        pytest.skip(f"the table is of jax {written['jax']} and libtpu {written['libtpu']}")
    assert row.ratio == pytest.approx(float(written["ratio"]), rel=0.1)
