"""The bytes of a decode step: how they add up, what is refused, and one compilation for chips that are not there."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import models
from kvjax import bench, bench_step
from kvjax._program import run
from kvjax.empty import abstract_cache
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.hlo import Movement
from tests.libtpu import needs_libtpu
from tests.libtpu import run as run_with_libtpu

PROGRAM = """
import sys
from kvjax import bench
from kvjax._program import run
sys.exit(run(bench.main, usage="", define_flags=bench.define_flags, allows_words=True, argv=["bench", *sys.argv[1:]]))
"""


@pytest.fixture
def program(capsys):
    def call(*argv):
        given = ["bench", "step", *argv]
        code = run(bench.main, usage="", define_flags=bench.define_flags, allows_words=True, argv=given)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models=qwen3-9b"], "Unknown published model 'qwen3-9b'. Did you mean 'qwen3-8b'?"),
        (["--policies=int5"], "Unknown policy term 'int5'"),
        (["--policies=int4+edges(1)"], "The policy 'int4+edges(1)' treats layers differently"),
        (["--topologies=v5l:2x4"], "Unknown kind of TPU 'v5l'. Did you mean 'v5p'?"),
        (["--topologies=v5e-8"], "Unknown kind of TPU 'v5e-8'. Did you mean 'v5e'?"),
        (["--topologies=v5e:8"], "The topology 'v5e:8' is not KIND:AxB or KIND:AxBxC, such as v5e:2x4."),
        (["--layers=4,2"], "--layers=4,2 must be 'all' or two numbers of layers, the smaller one first, such as 2,4"),
        (["--cases=16"], "The case '16' is not BATCHxCONTEXT"),
    ],
)
def test_mistakes_are_one_line(program, argv, message):
    code, _, err = program(*argv)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_missing_libtpu_is_one_line(program, monkeypatch):
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: None)
    code, _, err = program("--policies=full")
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'kvjax[aot]'" in err


def test_what_two_numbers_of_layers_differ_by_holds_for_all_others():
    first, second = {"bytes": 100, "ideal": 90}, {"bytes": 160, "ideal": 130}
    counts = bench_step.extrapolate(first, second, layers=(2, 4), num_layers=36)
    assert counts == {"bytes": 100 + 17 * 60, "ideal": 90 + 17 * 40}
    assert bench_step.extrapolate(first, second, layers=(2, 4), num_layers=4) == second


def test_all_layers_are_one_number():
    assert bench_step.parse_layers(["all"], 36) == (36,)
    assert bench_step.parse_layers(["2", "4"], 36) == (2, 4)


def test_rounds_are_kept_apart():
    moved = [
        Movement("a", "fusion", "", 10, 1, branch=False),
        Movement("b", "kernel", "", 100, 2, branch=False),
        Movement("c", "kernel", "", 1000, 3000, branch=True),
    ]
    assert bench_step.sum_up(moved) == {"bytes": 113, "written": 3, "kernels": 102, "round": 4000}


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-8b"])  # with a tied embedding and without
def test_the_ideal_is_each_weight_and_each_slot_once(name):
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = dataclasses.replace(models.published_config(name), num_layers=2)
    model = models.abstract_model(config, mesh=mesh)
    sizes = {"batch": 4, "max_tokens": 1024, "placement": model.placement}
    cache = abstract_cache(model.cache_shape, policy=parse_policy("int8"), **sizes)
    width, table = config.width, config.vocab_size * config.width
    on_both = 5 * width + config.qk_norm * 2 * 2 * config.head_size  # norms
    over_both = config.num_parameters() - on_both - (0 if config.tied_embeddings else table - 4 * width)
    numbers = config.num_kv_heads * config.head_size  # of keys or values, a chip has half of them
    exact = 260 * (numbers * 2 + 4)
    body = 768 * (numbers + config.num_kv_heads * 2 + 4)
    expected = 2 * (on_both + over_both // 2) + 2 * 4 * (exact + body)
    assert bench_step.ideal_bytes(model, cache) == expected


def test_a_policy_that_treats_layers_alike_passes():
    shape = models.published_config("qwen3-8b").cache_shape("bfloat16")
    for policy in bench_step.POLICIES.split(";"):
        bench_step.check_alike(parse_policy(policy), shape, max_tokens=32_768)
    with pytest.raises(UserError, match="treats layers differently"):
        bench_step.check_alike(parse_policy("snapkv(budget=2048)+layers(pyramid)"), shape, max_tokens=32_768)


@needs_libtpu
def test_a_step_moves_little_more_than_it_must(tmp_path, record_property):
    report = tmp_path / "report.json"
    flags = ["--models=qwen3-8b", "--topologies=v5e:2x4", "--policies=full", "--cases=16x32768", "--layers=1,2"]
    done = run_with_libtpu(PROGRAM, "step", *flags, "--quiet", f"--report={report}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ratio" in done.stdout
    (row,) = json.loads(report.read_text())["rows"]
    record_property(
        "print", f"{row['case']}, {row['name']}: {row['bytes']:,} bytes a chip, {row['ratio']:.4f} of ideal"
    )
    assert f"{row['ratio']:.3f}" in done.stdout
    assert 1.0 <= row["ratio"] < 1.05
    assert row["kernels"] > 0.5 * row["ideal"]
