"""Decode steps timed, of weights that were loaded and of weights that were drawn; more is in `test_bench.py`."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from kvjax import bench, bench_decode
from kvjax._program import run
from models import published_config


@pytest.fixture
def program(monkeypatch, capsys):
    """The program on a published shape made small."""
    small = {
        "num_layers": 2,
        "width": 32,
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "feed_forward": 64,
        "vocab_size": 128,
    }
    config = dataclasses.replace(published_config("qwen3-8b"), **small)
    monkeypatch.setattr(bench_decode, "published_config", lambda name: config)

    def call(*argv):
        given = ["bench", "decode", *argv, "--cases=2x9", "--new_tokens=3", "--repeats=1"]
        code = run(bench.main, usage="", define_flags=bench.define_flags, allows_words=True, argv=given)
        return code, capsys.readouterr()

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drawn_weights_and_a_cache_of_their_dtype(program, tmp_path, dtype):
    report = tmp_path / "report.json"
    code, printed = program("--model=qwen3-8b", "--random_weights", f"--dtype={dtype}", f"--report={report}")
    assert (code, printed.err) == (0, "")
    (row,) = json.loads(report.read_text())["rows"]
    size = jnp.dtype(dtype).itemsize
    assert row["cache_bytes"] == 2 * (2 * 2 * 2 * 12 * 128 * size + 2 * 12 * 4)
    assert row["tokens_per_second"] == pytest.approx(2 / row["seconds_per_step"])


def test_a_peer_has_no_drawn_weights(program):
    code, printed = program("--model=qwen3-8b", "--random_weights", "--against=transformers")
    assert code == 2
    assert "--random_weights are drawn here" in printed.err


def test_a_peer_is_measured_in_float32(program):
    code, printed = program("--dtype=bfloat16", "--against=transformers")
    assert code == 2
    assert "--dtype=bfloat16: peers are measured in float32" in printed.err


def test_a_shape_that_is_unknown(capsys):
    given = ["bench", "decode", "--model=qwen3-9b", "--random_weights"]
    assert run(bench.main, usage="", define_flags=bench.define_flags, allows_words=True, argv=given) == 2
    assert "Unknown published model 'qwen3-9b'" in capsys.readouterr().err
