"""Attention over segments of each kind, measured: what the rows say."""

import pytest

from kvjax import bench_kernels
from kvjax.peers import Case


def test_rows_say_what_ran_and_how_many_bytes_it_read(monkeypatch):
    monkeypatch.setattr(bench_kernels, "BUDGET", 64)
    kinds = {
        "bf16": bench_kernels.Kind(16),
        "int4": bench_kernels.Kind(4),
        "few": bench_kernels.Kind(2, 64),
        "table": bench_kernels.Kind(3, table=True),
        "kivi": bench_kernels.Kind(2, grouped=True),
    }
    monkeypatch.setattr(bench_kernels, "KINDS", kinds)
    rows = bench_kernels.measure_kernels(Case(batch=2, context=256), repeats=1, calls=2)
    heads = 2 * bench_kernels.HEADS
    expected = [
        256 * (heads * 2 * 128 * 2 + 2 * 4),
        256 * (heads * 2 * (64 + 2) + 2 * 4),
        64 * (heads * 2 * (32 + 2) + 2 * 4),
        256 * (heads * 2 * (48 + 2) + 2 * 4),
        256 * (heads * 2 * (32 + 128 * 4 // 32) + 2 * 4),  # two float16 for each 32 numbers
    ]
    assert [row["bytes"] for row in rows] == expected
    assert {row["implementation"] for row in rows} == {"reference"}
    assert rows[0]["times_as_fast_as_first"] == 1.0
    for row in rows:
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["share_of_copy"] > 0
