"""The program: it writes a config that decodes, goes on where it stopped, and says each mistake in one line."""

import json

import pytest

import models
from kvjax import decode, tune
from kvjax._program import run
from kvjax.byte_tokenizer import write_byte_tokenizer
from kvjax.grammar import parse_policy
from kvjax.search import Score
from kvjax.symbols import SYMBOLS
from tests.tiny import tiny_model

SMALL = ("--tasks=copy(tokens=150,length=4)", "--selections=", "--codecs=int8;int2", "--examples=2", "--trials=3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random model whose tokenizer has the symbols of tasks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    models.save_checkpoint(tiny_model(vocab_size=384), folder)
    write_byte_tokenizer(folder, vocab_size=384, max_positions=512, symbols=SYMBOLS)
    return folder


@pytest.fixture
def program(checkpoint, capsys, tmp_path, monkeypatch):
    """Runs a program in an empty folder; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, module=tune):
        code = run(
            module.main,
            usage=module.__doc__,
            default_config="configs/tiny_cpu.py",
            define_flags=module.define_flags,
            argv=["program", f"--config.model={checkpoint}", *argv],
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


class Quick:
    """Judges and evaluates by the text of a policy."""

    asked = []

    def __init__(self, *given, **named):
        pass

    def __call__(self, policy):
        self.asked.append(str(policy))
        accuracy = 0.5 + 0.25 * ("int8" in str(policy))
        return Score(accuracy=accuracy, kl=0.1, step=0.1, tasks={})

    def evaluate(self, cell, policy):
        scores = [1.0, float("int2" not in str(policy))]
        row = {"task": cell.task.name, "question": cell.question, "policy": str(policy), "examples": 2}
        row |= {"scores": scores, "accuracy": sum(scores) / 2, "accuracy_low": 0.0, "accuracy_high": 1.0}
        return {**row, "kl_mean": 0.1, "top1_agreement": 0.9, "max_tokens": cell.max_tokens}, []


@pytest.fixture
def quick(monkeypatch):
    """Replaces what takes time; gives the policies that were judged."""
    monkeypatch.setattr(tune, "Judge", Quick)
    monkeypatch.setattr(tune, "Evaluator", Quick)
    monkeypatch.setattr(tune.jax, "clear_caches", lambda: None)
    monkeypatch.setattr(Quick, "asked", [])
    return Quick.asked


def test_a_search_writes_a_config_and_a_report_and_goes_on(program, quick, tmp_path):
    code, out, err = program(*SMALL, "--ratio=1.5", "--output=found.py")
    assert (code, err) == (0, "")
    report = json.loads((tmp_path / "build" / "tune" / "found" / "report.json").read_text())
    limit = report["limit"]
    assert limit == 2 * 2 * 2 * 16 * 4 / 1.5  # layers, keys and values, heads, numbers, bytes
    assert len(report["trials"]) == len(quick) == 3
    assert all(trial["bytes_per_token"] <= limit for trial in report["trials"])
    assert "int8" in report["policy"]
    assert parse_policy(report["policy"]).text == report["policy"]
    text = (tmp_path / "found.py").read_text()
    assert f'    config.policy = "{report["policy"]}"' in text
    for words in ("search half, best of 3 policies", "copy(tokens=150,length=4), question inside", "found.py"):
        assert words in out
    assert program(*SMALL, "--ratio=1.5", "--output=found.py", "--trials=4")[0] == 0
    assert len(quick) == len(set(quick)) == 4
    assert (tmp_path / "found.py").read_text().count("best of 4 policies") == 1
    code, _, err = program(*SMALL, "--ratio=1.25", "--output=found.py")
    assert (code, err.count("\n")) == (2, 1)
    assert "of a search with other settings (limit); give another --work" in err


@pytest.mark.slow
def test_a_written_config_decodes(program, monkeypatch):
    """Judge and evaluation are real, on the words of a random model."""
    monkeypatch.setattr(tune.jax, "clear_caches", lambda: None)
    given = ("--codecs=int8", "--examples=1", "--trials=1", "--batch=1", "--bytes-per-token=300", "--quiet")
    code, _, err = program(*SMALL, *given, "--output=found.py")
    assert (code, err) == (0, "")
    code, out, err = program("--config=found.py", "--config.max_new_tokens=3", "--prompt=Hello", module=decode)
    assert code == 0
    assert out.startswith("Hello")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ratio=2"], "--output=CONFIG.py is missing"),
        (["--output=found.py"], "Give the limit once: --bytes-per-token=BYTES, or --ratio"),
        (["--output=found.py", "--ratio=2", "--bytes_per_token=9"], "Give the limit once"),
        (["--output=found.py", "--ratio=0"], "--ratio is 0.0; it must be above 0"),
        (["--output=found.py", "--ratio=2", "--seconds=-1"], "--seconds is -1.0; it must be above 0"),
        (["--output=found.txt", "--ratio=2"], "give a Python file, e.g. found.py"),
        (["--output=mine.py", "--ratio=2"], "mine.py is there and was not written by kvjax.tune"),
        (["--output=found.py", "--ratio=2", "--tasks=copi"], "Unknown task 'copi'. Did you mean 'copy'"),
        (["--output=found.py", "--ratio=2", "--questions=before"], "Unknown place of the question 'before'"),
        (["--output=found.py", "--ratio=2", "--trials=0"], "--trials is 0; it must be at least 1"),
        (["--output=found.py", "--ratio=2", "--codecs=int9"], "Unknown policy term 'int9'"),
        (["--output=found.py", "--ratio=2", "--selections=h2o(budget=9)"], "has a budget, which is what is searched"),
        (["--output=found.py", "--ratio=2", "--selections=triattention"], "statistics"),
        (["--output=found.py", "--bytes-per-token=1"], "below the smallest possible: int2+exact("),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(program, quick, tmp_path, argv, message):
    (tmp_path / "mine.py").write_text('"""Mine."""\n')
    code, out, err = program(*SMALL, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not quick
