"""The settings of a run become a sampling rule, a cache and its account (whole runs: test_decode.py)."""

import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kvjax import decode
from kvjax._program import run
from kvjax.decoder import read_sampling
from kvjax.folder import ROOT
from kvjax.sampling import Sampling
from kvjax.statistics import Statistics, empty_statistics
from kvjax.statistics_file import save_statistics
from models.hf_config import parse_config
from tests.tiny import tiny_config


def test_sampling_follows_the_checkpoint_where_the_config_is_silent(tmp_path):
    def read(published, **chosen):
        (tmp_path / "generation_config.json").write_text(json.dumps(published))
        fields = {"temperature": None, "top_k": None, "top_p": None, "min_p": None, **chosen}
        return read_sampling(ConfigDict({"sampling": fields}), tmp_path)

    assert read({}) == Sampling()
    assert read({"temperature": 0.6, "top_k": 20}) == Sampling()  # do_sample is not set: greedy
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert read(published) == Sampling(temperature=0.6, top_p=0.95, top_k=20)
    assert read(published, temperature=0.0) == Sampling(temperature=0.0, top_p=0.95, top_k=20)
    assert read({"do_sample": True}) == Sampling(temperature=1.0)


def test_what_is_not_followed_is_named(tmp_path, capsys):
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "repetition_penalty": 1.05, "num_beams": 1})
    )
    fields = {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
    read_sampling(ConfigDict({"sampling": fields}), tmp_path)
    assert "asks for repetition_penalty 1.05, which is not supported" in capsys.readouterr().err


PROMPT = "Call me Ishmael. Some years ago, I went."  # 40 tokens, which are bytes


@pytest.fixture
def program(capsys):
    """Decodes with the model in the tree; gives exit code, standard output and standard error."""

    def call(*argv):
        given = ["decode", f"--prompt={PROMPT}", "--config.max_new_tokens=20", "--noconfig.stop_at_end"]
        code = run(
            decode.main,
            usage=decode.__doc__,
            default_config="configs/tiny_cpu.py",
            define_flags=decode.define_flags,
            argv=[*given, "--config.policy=full", "--noconfig.compare_with_full", *argv],
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def write_statistics(path, shape):
    """A file in which every mean is zero and all moments are those of independent numbers."""
    layers = jax.tree.map(
        lambda leaf: np.broadcast_to(np.eye(leaf.shape[-1]), leaf.shape) if leaf.ndim == 3 else np.zeros(leaf.shape),
        empty_statistics(shape),
    )
    save_statistics(path, Statistics(layers, shape))


def test_a_run_reports_what_its_cache_takes(program, tmp_path):
    """59 tokens are seen, of which 18 fit into the exact segment before the first of six rounds."""
    path = tmp_path / "report.json"
    policy = "int8+exact(sinks=2,window=8,round=8)"
    code, _, err = program(f"--config.policy={policy}", f"--report={path}")
    assert code == 0
    assert f"({policy})" in err
    report = json.loads(path.read_text())
    assert (report["policy"], report["new_tokens"], report["rounds"]) == (policy, 20, 6)
    cache = report["cache"]
    slots = (18, 14 * 8)  # 128 tokens of room; the body takes what the exact segment does not, in rounds of eight
    numbers = 4 * 2 * 64  # layers, heads, size
    assert cache["stated_bytes"] == numbers * 2 * (slots[0] * 4 + slots[1] * 8.25 / 8)
    assert cache["device_bytes"] == cache["stated_bytes"] + 4 * sum(slots) * 4 == report["cache_bytes"]
    assert (cache["key_bits"], cache["value_bits"], len(cache["layers"])) == (8.25, 8.25, 4)
    assert all((layer["exact_slots"], layer["body_slots"]) == slots for layer in cache["layers"])
    assert cache["ratio_to_dtype"] == pytest.approx(report["full_cache_bytes"] / report["cache_bytes"])
    assert cache["ratio_to_dtype"] == pytest.approx(2 * cache["ratio_to_bfloat16"])
    assert cache["ratio_to_dtype"] > 2.5


def test_policies_that_need_statistics(program, tmp_path):
    """They run with those given or beside the weights; without, or with another model's, the mistake is one line."""
    fields = json.loads((ROOT / "models" / "tiny" / "config.json").read_text())
    write_statistics(tmp_path / "own", parse_config(fields, source="models/tiny").cache_shape("float32"))
    write_statistics(tmp_path / "other", tiny_config().cache_shape("float32"))
    policy = "--config.policy=lowrank(rank=16)"
    own = f"--config.statistics={tmp_path / 'own'}"
    assert program(policy, own, "--config.max_new_tokens=1")[0] == 0
    assert program(policy, "--config.max_new_tokens=1")[0] == 0
    bare = shutil.copytree(ROOT / "models" / "tiny", tmp_path / "bare", ignore=lambda *_: ["statistics.safetensors"])
    for given, message in (
        (f"model={bare}", "needs statistics of the model's keys: write them once with `python -m kvjax.calibrate"),
        (f"statistics={tmp_path / 'other'}", "belong to another model: their num_layers is 2, the model's is 4"),
        (f"statistics={tmp_path / 'none'}", "There is no statistics file"),
    ):
        code, out, err = program(policy, f"--config.{given}")
        assert (code, out) == (2, "")
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
