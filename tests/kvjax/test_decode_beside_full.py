"""The program with both caches and with tasks: what it shows, what its report holds, and mistakes in one line."""

import json

import pytest

from kvjax import decode
from kvjax.byte_tokenizer import write_byte_tokenizer
from tests.decoding_program import run_decode, save_small


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def program(checkpoint, capsys):
    """Runs the program; gives exit code, standard output and standard error."""
    return lambda *argv: run_decode(checkpoint, capsys, *argv)


HARSH = ("--config.policy=streaming(budget=8)+exact(sinks=2,window=4,round=8)", "--config.sampling.temperature=0")
LONG = "Some years ago, never mind how long."  # 36 tokens


def test_both_caches_are_shown_and_compared(program, tmp_path):
    """Texts one under the other, the first difference, KL and bytes; the report has all of it, step by step."""
    path = tmp_path / "report.json"
    code, out, err = program(f"--prompt={LONG}", *HARSH, "--compare_with_full", f"--report={path}")
    assert code == 0
    report = json.loads(path.read_text())
    found = report["comparison"]
    texts = f"--- {report['policy']}\n{found['text']}\n--- full\n{found['full_text']}\n"
    assert out.startswith(f"{LONG}\n{texts}--- differs from full at token ")
    assert f"--- differs from full at token {found['first_difference']}: " in out
    assert "--- KL(full || policy) mean " in out
    assert f"cache {report['cache_bytes']:,} bytes" in out
    assert f"full {found['full_cache_bytes']:,} bytes" in out
    assert found["cache_bytes"] == report["cache_bytes"] < found["full_cache_bytes"]
    assert len(found["kl_per_step"]) == report["new_tokens"] == 6
    assert report["config"]["compare_with_full"]
    assert "36 prompt + 6 new tokens" in err


def test_a_comparison_that_nobody_would_see_is_not_made(program, monkeypatch):
    monkeypatch.delattr(decode.Comparison, "compare")
    code, out, err = program("--prompt=Hello", "--compare_with_full", "--quiet")
    assert (code, err) == (0, "")
    assert out.startswith("Hello")
    assert "---" not in out
    assert program("--prompt=Hello", "--config.compare_with_full", "--nocompare_with_full")[0] == 0


def test_lines_of_a_file_are_compared_and_summed_up(program, tmp_path):
    """Three lines in two batches: the last one has an idle row."""
    source, target, path = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "report.json"))
    lines = [{"prompt": LONG}, {"prompt": "One"}, {"messages": [{"role": "user", "content": LONG}]}]
    source.write_text("\n".join(map(json.dumps, lines)))
    argv = (f"--prompts={source}", *HARSH, "--config.compare_with_full")
    code, out, err = program(*argv, f"--output={target}", f"--report={path}")
    assert (code, out) == (0, "")
    written = [json.loads(line) for line in target.read_text().splitlines()]
    report = json.loads(path.read_text())["comparison"]
    alike = [row["first_difference"] is None for row in written]
    assert alike == [row["text"] == row["full_text"] for row in written]
    assert alike[1]  # three tokens and six new ones fit uncompressed
    assert not all(alike)
    assert (report["prompts"], report["same"]) == (3, sum(alike))
    assert report["agreement"] == pytest.approx(sum(row["agreement"] for row in written) / 3)
    assert report["kl_max"] == max(row["kl_max"] for row in written)
    assert f"compared with full: {sum(alike)} of 3 texts the same" in err
    code, out, _ = program(*argv)
    assert code == 0
    assert out.count("--- full\n") == 3
    assert out.count("--- KL(full || policy)") == 3


def test_a_task_is_posed_and_its_answer_judged(program, tmp_path):
    """A random model is wrong; its answers end where the task says."""
    path = tmp_path / "report.json"
    task = ("--config.task=passkey(tokens=48)", "--config.task_example=3", "--config.max_new_tokens=100", *HARSH)
    code, out, err = program(*task, f"--report={path}", "--compare_with_full")
    assert code == 0
    report = json.loads(path.read_text())
    posed = report["task"]
    assert (posed["name"], posed["example"]) == ("passkey(tokens=48)", 3)
    assert out.startswith("--- passkey(tokens=48), example 3\n")
    assert out.count(f"--- wrong, expected {posed['expected']}\n") == 1
    assert out.count("--- wrong\n") == 1
    assert (posed["score"], posed["full_score"]) == (0.0, 0.0)
    assert f"48 prompt + {report['new_tokens']} new tokens" in err
    assert report["new_tokens"] <= 6  # five digits and the end
    assert program(*task, "--prompt=Hello", "--config.max_new_tokens=1", "--quiet")[1].startswith("Hello")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.task=dfs", "--config.prompt=x"], "config.prompt and config.task are both set: give --prompt"),
        (["--config.task="], "There is no prompt: give --prompt='...', or set config.prompt or config.task"),
        (["--config.task=dsf"], "Unknown task 'dsf'. Did you mean 'dfs'?"),
        (["--config.task=dfs(nods=3)"], "nods"),
        (["--config.task=ppl"], "there is nothing to decode"),
        (["--config.task=dfs", "--config.task_example=-1"], "config.task_example is -1; it must be at least 0"),
        (["--config.task=dfs", "--config.tokenizer={folder}"], "the model's tokenizer has no token '[FACT]'"),
        (["--config.task=dfs", "--config.max_tokens=99"], "The prompt of dfs, example 0 has 160 tokens; with"),
        (["--config.task=dfs", "--config.chat", "--config.system_prompt=x"], "a task makes its own"),
        (["--compare_with_full=perhaps"], "compare_with_full"),
    ],
)
def test_tasks_and_comparisons_that_cannot_be(program, tmp_path, argv, message):
    write_byte_tokenizer(tmp_path, vocab_size=384, max_positions=512)
    code, out, err = program(*(word.replace("{folder}", str(tmp_path)) for word in argv))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
