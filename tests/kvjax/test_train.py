"""Training learns, an interrupted run gives what an uninterrupted one gives, and its folder decodes."""

import json

import jax
import numpy as np
import pytest

import kvjax
import models
from configs.tiny_train import get_config
from kvjax import train
from kvjax._program import run
from kvjax.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """optax multiplies integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def config(tmp_path):
    """A run of 30 steps of a very small model on one sentence."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = get_config()
    config.model.update(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=64)
    config.update(
        texts=(str(text),),
        held_out_share=0.2,
        stages=({"steps": 20, "rows": 4, "tokens": 32}, {"steps": 10, "rows": 2, "tokens": 64}),
        warmup_steps=5,
        checkpoint_every=10,
        validate_every=10,
        checkpoint_folder=str(tmp_path / "run"),
        output=str(tmp_path / "out"),
    )
    return config


def test_a_run_learns_resumes_and_decodes(config, tmp_path, monkeypatch):
    whole = train.train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["held_out_loss"] < lines[0]["held_out_loss"] < np.log(384)

    config.checkpoint_folder = str(tmp_path / "interrupted")
    batch = train.Corpus.batch

    def stops_at_17(self, step, **rest):
        if step == 17:
            raise KeyboardInterrupt
        return batch(self, step, **rest)

    monkeypatch.setattr(train.Corpus, "batch", stops_at_17)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, quiet=True)
    monkeypatch.undo()
    resumed = train.train(config, quiet=True)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    again = [json.loads(line) for line in (tmp_path / "interrupted" / "log.jsonl").read_text().splitlines()]
    assert [line["held_out_loss"] for line in again] == [line["held_out_loss"] for line in lines]

    output = train.write_output(config, resumed, code="abc")
    loaded = models.load_model(output, dtype="float32")
    tokens = kvjax.load_tokenizer(output).encode("the quick")
    assert len(kvjax.generate(loaded, [tokens], max_new_tokens=5)[0]) <= 5
    assert (output / "train_log.jsonl").exists()


def test_stages_follow_each_other(config):
    assert train.num_steps(config) == 30
    assert [train.stage_at(config, step)["rows"] for step in (0, 19, 20, 29)] == [4, 4, 2, 2]


def test_mistakes_are_refused(config, capsys, tmp_path):
    config.stages = ({"steps": 1, "rows": 1, "tokens": 128},)
    with pytest.raises(UserError, match="none with more tokens than the model's context"):
        train.check_config(config)
    config.stages = ({"steps": 4, "rows": 1, "tokens": 8},)
    with pytest.raises(UserError, match="warmup_steps is 5"):
        train.check_config(config)
    code = run(
        train.main,
        usage="",
        default_config="configs/tiny_train.py",
        define_flags=train.define_flags,
        argv=["train", "--config.texts=('nowhere.txt',)", f"--config.checkpoint_folder={tmp_path}"],
    )
    assert code == 2
    assert "There is no text 'nowhere.txt'" in capsys.readouterr().err
