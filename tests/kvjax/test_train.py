"""Training learns, moves on by accuracy, goes on where it was stopped, and its folder decodes."""

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
from kvjax.learning import Place
from kvjax.lessons import Lessons
from kvjax.symbols import SYMBOLS
from tests.tiny import tiny_model

SECONDS = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def ordinary_promotion():
    """optax multiplies integers and floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def little_validation(monkeypatch):
    monkeypatch.setattr(train, "_VALIDATION_TOKENS", 512)


@pytest.fixture
def one_compilation(config, monkeypatch):
    """All runs of a test share the step."""
    step = train.make_step(train.make_optimizer(config))
    monkeypatch.setattr(train, "make_step", lambda optimizer: step)


@pytest.fixture
def config(tmp_path):
    """A very small model, two tasks and one sentence: the first stage ends when it is first measured."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    config = get_config()
    config.model.update(hidden_size=32, intermediate_size=48, num_hidden_layers=1, max_position_embeddings=64)
    del config.mix
    config.update(
        texts=(str(text),),
        held_out_share=0.2,
        mix={"needle": 0.3, "copy": 0.3, "text": 0.4},
        stages=(
            {
                "tokens": 48,
                "rows": 4,
                "accuracy": 0.0,
                "most_steps": 50,
                "test_rows": 6,
                "mix": {"copy": 0.5, "text": 0.5},
            },
            {"tokens": 64, "rows": 2, "most_steps": 13, "test_rows": 3},
        ),
        learning_rate=1e-2,
        warmup_steps=3,
        checkpoint_every=6,
        validate_every=8,
        checkpoint_folder=str(tmp_path / "run"),
        output=str(tmp_path / "out"),
    )
    return config


def log_of(folder):
    """Lines of a run's log, without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in lines)
    return [{name: value for name, value in line.items() if name not in SECONDS} for line in lines]


def interrupt(config, monkeypatch, *, step):
    """Trains until just before that step."""
    batch = Lessons.batch

    def stops(self, at, **rest):
        if at == step:
            raise KeyboardInterrupt
        return batch(self, at, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Lessons, "batch", stops)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, quiet=True)


@pytest.mark.slow
@pytest.mark.usefixtures("one_compilation")
def test_a_run_learns_resumes_and_decodes(config, tmp_path, monkeypatch):
    whole = train.train(config, quiet=True)
    log = log_of(tmp_path / "run")
    assert [(line["step"], line["tokens"]) for line in log] == [(8, 48), (16, 64), (21, 64)]  # on after 8, of 50
    assert [sorted({"copy", "needle"} & set(line)) for line in log] == [
        ["copy"],
        ["copy", "needle"],
        ["copy", "needle"],
    ]
    assert all(0 <= line["copy"] <= 1 for line in log)
    assert log[-1]["held_out_loss"] < log[0]["held_out_loss"] < np.log(384)

    config.checkpoint_folder = str(tmp_path / "interrupted")
    interrupt(config, monkeypatch, step=17)  # in the second stage, past a checkpoint and past a line of the log
    resumed = train.train(config, quiet=True)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    assert log_of(tmp_path / "interrupted") == log

    again = train.train(config, quiet=True)  # nothing is left to do
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    assert log_of(tmp_path / "interrupted") == log

    output = train.write_output(config, resumed, code="abc")
    loaded = models.load_model(output, dtype="float32")
    tokenizer = kvjax.load_tokenizer(output)
    tokens = tokenizer.encode("the quick[FACT]<17><5>")
    assert tokens[-3:] == [259 + SYMBOLS.index(one) for one in ("[FACT]", "<17>", "<5>")]
    assert len(kvjax.generate(loaded, [tokens], max_new_tokens=5)[0]) <= 5
    assert log_of(tmp_path / "interrupted") == [
        {name: value for name, value in json.loads(line).items() if name not in SECONDS}
        for line in (output / "train_log.jsonl").read_text().splitlines()
    ]
    made = json.loads((output / "train_config.json").read_text())
    assert made["commit"] == "abc"
    assert made["config"]["mix"] == {"needle": 0.3, "copy": 0.3, "text": 0.4}


STAGED = {"stages": ({"most_steps": 10, "accuracy": 0.9}, {"most_steps": 20, "learning_rate": 0.5})}


@pytest.fixture
def staged(config):
    """Two stages, the second with a learning rate of its own."""
    config.update(**STAGED, learning_rate=1.0, warmup_steps=4, final_learning_rate_share=0.1)
    return config


def test_a_stage_ends_when_every_task_is_solved(staged):
    place = Place(5, 0, 5)
    on, stay = Place(6, 1, 0), Place(6, 0, 6)
    assert train.next_place(staged, place, None) == stay  # not measured
    assert train.next_place(staged, place, {"needle": 1.0, "copy": 0.89}) == stay
    assert train.next_place(staged, place, {"needle": 1.0, "copy": 0.9}) == on


def test_a_stage_ends_after_its_most_steps(staged):
    assert train.next_place(staged, Place(9, 0, 9), {"needle": 0.0}) == Place(10, 1, 0)
    assert train.next_place(staged, Place(12, 1, 3), {"needle": 1.0}) == Place(13, 1, 4)  # asks for no accuracy
    assert train.next_place(staged, Place(29, 1, 19), None) is None


def test_the_learning_rate_warms_up_stays_and_cools_down_in_the_last_stage(staged):
    def rates(stage, before, steps):
        return [train.learning_rate(staged, Place(before + step, stage, step)) for step in steps]

    np.testing.assert_allclose(rates(0, 0, range(6)), [0.25, 0.5, 0.75, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(rates(1, 10, [0, 10, 20]), [0.5, 0.5 * 0.55, 0.5 * 0.1])


def test_accuracy_is_the_share_of_rows_whose_first_answer_is_right_in_every_token(config, tmp_path, monkeypatch):
    lessons = train.make_lessons(config, tmp_path / "lessons")
    stage = {"tokens": 48, "rows": 4, "test_rows": 6}  # six rows, four at a time
    rows = lessons.test_rows("needle", seed=config.seed, rows=6, tokens=48)
    copies = lessons.test_rows("copy", seed=config.seed, rows=6, tokens=48)
    mistakes = {(row, token) for row in range(6) for token in range(1, 49)}
    mistakes -= {(row, token) for row in range(6) for token in range(rows.first[row], rows.last[row])}
    mistakes |= {(1, rows.first[1]), (4, rows.last[4] - 1), (5, rows.first[5] + 1)}
    wrong = {(rows.tokens[row].tobytes(), token) for row, token in mistakes}
    known = {row.tobytes() for row in (*rows.tokens, *copies.tokens, np.zeros(49, np.int32))}

    def right_tokens(model, given):
        found = [np.asarray(row) for row in given]
        assert all(row.tobytes() in known for row in found)
        return np.asarray([[(row.tobytes(), token) not in wrong for token in range(1, 49)] for row in found])

    monkeypatch.setattr(train, "right_tokens", right_tokens)
    found = train.task_accuracy(tiny_model(layers=1), lessons, config=config, stage=stage)
    assert found == {"needle": 0.5, "copy": 1.0}


@pytest.mark.parametrize("tokens", [48, 64, 600])
def test_all_rows_that_are_held_out_count_the_same(config, tmp_path, monkeypatch, tokens):
    """Also where rows do not divide the tokens of a validation, or are longer."""
    config.stages = ({"tokens": 600},)
    config.held_out_share = 0.5
    lessons = train.make_lessons(config, tmp_path / "lessons")
    seen = []

    def loss(model, rows, weights):
        assert rows.shape == weights.shape == (4, tokens + 1)
        seen.append(np.asarray(rows))
        return np.float32(len(seen))

    monkeypatch.setattr(train, "_validate", loss)
    mean = train._held_out_loss(tiny_model(layers=1), lessons, tokens)
    assert mean == np.mean(range(1, len(seen) + 1))
    assert len(seen) == max(512 // (4 * tokens), 1)
    np.testing.assert_array_equal(np.concatenate(seen), lessons.corpus.held_out_rows(rows=4 * len(seen), tokens=tokens))


def test_a_stage_has_a_mix_of_its_own_or_the_runs(config):
    assert [train.mix_of(config, stage) for stage in config.stages] == [
        {"copy": 0.5, "text": 0.5},
        {"needle": 0.3, "copy": 0.3, "text": 0.4},
    ]


def test_filler_is_cut_from_the_ascii_of_the_texts(config, tmp_path):
    (tmp_path / "text.txt").write_text("Caf\u00e9 au lait. " * 200)
    lessons = train.make_lessons(config, tmp_path / "lessons")
    assert lessons.books.startswith("Caf au lait. Caf au lait. ")
    assert (tmp_path / "lessons" / "tokenizer" / "tokenizer.json").exists()


def test_lines_past_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "seconds": step / 2.0} for step in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "sec')
    log = train._Log(path, start=20)
    log.count(100)
    log.write(30, loss=1.23456)
    *kept, new = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == lines[:2]
    assert (new["step"], new["loss"]) == (30, 1.2346)
    assert new["seconds"] >= 10.0  # time goes on too


def test_the_shipped_config_is_accepted():
    config = get_config()
    train.check_config(config)
    assert config.model.vocab_size >= 259 + len(SYMBOLS)
    assert all(sum(train.mix_of(config, stage).values()) == pytest.approx(1.0) for stage in config.stages)
    *growing, last = [stage["tokens"] for stage in config.stages]
    assert growing == sorted(growing)
    assert last < growing[-1] == config.model.max_position_embeddings  # it cools down on many questions


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": ()}, "config.stages must hold at least one stage"),
        ({"stages": ({"tokens": 128},)}, "none with more tokens than the model's context"),
        ({"stages": ({"tokens": 64, "mix": {"dormant": 1.0}},)}, "The task 'dormant' has no rows to learn from"),
        ({"stages": ({"tokens": 64}, {"tokens": 47})}, "too short for a problem: give each at least 48 tokens"),
        ({"warmup_steps": 0}, "config.warmup_steps is 0; it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, message):
    config.update(settings)
    with pytest.raises(UserError, match=message):
        train.check_config(config)


def test_mistakes_are_one_line(capsys, tmp_path):
    def complaint(*arguments):
        code = run(
            train.main,
            usage="",
            default_config="configs/tiny_train.py",
            define_flags=train.define_flags,
            argv=["train", f"--config.checkpoint_folder={tmp_path}", *arguments],
        )
        assert code == 2
        return capsys.readouterr().err

    assert "There is no text 'nowhere.txt'" in complaint("--config.texts=('nowhere.txt',)")
    text = tmp_path / "text.txt"
    text.write_text("a sentence. " * 10_000)
    here = f"--config.texts=('{text}',)"
    assert "vocab_size is 300; bytes, special tokens and symbols take 373" in complaint(
        here, "--config.model.vocab_size=300"
    )
