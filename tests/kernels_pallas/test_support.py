"""The table of what runs where: README repeats what the program prints."""

from pathlib import Path

import pytest

from kernels_pallas import support

README = Path(support.__file__).with_name("README.md")


def test_readme_repeats_the_table():
    assert support.table() in README.read_text(encoding="utf-8")


def test_every_cell_names_an_implementation_and_cpus_run_the_reference():
    for row in support.rows():
        assert row.choose("cpu").name == "reference"
        assert row.choose("cpu").reasons


@pytest.mark.parametrize(
    ("operation", "what", "device", "name"),
    [
        ("decode_attention", "bfloat16", "v5e", "mosaic_tpu"),
        ("decode_attention", "4 bits", "v6e", "mosaic_tpu"),
        ("decode_attention", "keys 4 bits, values 2", "v5p", "mosaic_tpu"),
        ("decode_attention", "4 bits", "tpu7x", "mosaic_tpu"),
        ("decode_attention", "keys from before RoPE", "v6e", "reference"),
        ("decode_attention", "4 bits, pages of 16", "v5e", "mosaic_tpu"),
        ("decode_attention", "4 bits, heads of 64, pages of 16", "v6e", "reference"),
        ("score", "4 bits, rotated", "v5e", "mosaic_tpu"),
        ("score", "keys from before RoPE", "v6e", "reference"),
    ],
)
def test_some_cells(operation, what, device, name):
    (row,) = [row for row in support.rows() if (row.operation, row.what) == (operation, what)]
    assert row.choose(support.DEVICES[device]).name == name


def test_the_program_prints_the_table_and_reasons(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["support", "--reasons"])
    assert support.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith(support.table())
    assert "decode_attention, keys from before RoPE, v6e: mosaic_tpu: keys are turned when they are read" in printed
