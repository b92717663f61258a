"""The program that evaluates policies: rows of its report, its table, interrupts, mistakes, and held-out text."""

import json
import os
import shutil
import string

import numpy as np
import pytest

from kvjax import evaluate
from kvjax._program import run
from kvjax.errors import UserError
from kvjax.folder import find_checkpoint
from kvjax.statistics import Statistics, empty_statistics
from kvjax.statistics_file import save_statistics
from kvjax.text import load_tokenizer
from tests.conftest import ROOT
from tests.tiny import tiny_config

SMALL = "+exact(sinks=2,window=8,round=8)"
SIZES = ("--rows=2", "--prefix=160", "--tokens=64", "--held_out_share=0.5")


@pytest.fixture
def text(tmp_path):
    """A text of words that the model may know."""
    words = ["the", "sea", "and", "a", "king", "of", "men", "was", "not", "with", "his", "ship", "in", "that", "day"]
    chosen = np.random.default_rng(0).choice(words, 200)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(chosen) + "\n")
    return path


@pytest.fixture
def program(capsys):
    """Runs the program on the model in the tree; gives exit code, standard output and standard error."""

    def call(*argv):
        code = run(
            evaluate.main,
            usage=evaluate.__doc__,
            default_config="configs/tiny_cpu.py",
            define_flags=evaluate.define_flags,
            argv=["evaluate", *argv],
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_report_and_a_table(program, text, tmp_path):
    """Full comes first, once, whatever is asked for; 192 tokens a row, of which 18 at most are exact."""
    path = tmp_path / "new" / "report.json"
    code, out, err = program(f"--text={text}", *SIZES, f"--policies=int8{SMALL};full", f"--report={path}")
    assert (code, err) == (0, "")
    report = json.loads(path.read_text())
    wanted = "program commit date device versions config policy implementations flags rows"
    assert set(wanted.split()) <= report.keys()
    assert (report["program"], report["policy"]) == ("kvjax.evaluate", f"int8{SMALL};full")
    assert report["flags"]["prefix"] == 160
    full, int8 = report["rows"]
    wanted = (
        "task policy tokens perplexity perplexity_change kl_mean kl_p999 top1_agreement cache_bytes full_cache_bytes "
        "stated_bytes device_bytes key_bits value_bits ratio_to_dtype ratio_to_bfloat16 seconds layers"
    )
    for row in (full, int8):
        assert set(wanted.split()) <= row.keys()
        assert row["tokens_per_second"] > 0
        assert (row["task"], row["tokens"], len(row["layers"])) == ("ppl", 64, 4)
        assert row["full_cache_bytes"] == 2 * 4 * 2 * 2 * 192 * 64 * 4  # keys and values, layers, rows, heads, ...
    assert (full["policy"], full["kl_mean"], full["top1_agreement"]) == ("full", 0.0, 1.0)
    assert (full["key_bits"], full["perplexity_change"]) == (32.0, 0.0)
    assert (int8["policy"], int8["key_bits"]) == (f"int8{SMALL}", 8.25)
    assert 0 < int8["kl_mean"] < 0.01
    assert int8["ratio_to_dtype"] > 2.5
    for shown in ("perplexity of 64 tokens", "full", f"int8{SMALL}", f"{int8['perplexity']:.4f}", "8.250"):
        assert shown in out


def test_an_interrupt_keeps_the_rows_that_are_done(program, text, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    score = evaluate.score

    def stops(model, policy, *rest, **named):
        if str(policy) != "full":
            raise KeyboardInterrupt
        return score(model, policy, *rest, **named)

    monkeypatch.setattr(evaluate, "score", stops)
    code, out, err = program(f"--text={text}", *SIZES, "--policies=int8,int4", f"--report={path}")
    assert (code, out, err) == (130, "", "interrupted\n")
    assert [row["policy"] for row in json.loads(path.read_text())["rows"]] == ["full"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=pl"], "Unknown task 'pl'. Did you mean 'ppl'?"),
        (["--policies=int8;in8"], "Unknown policy term 'in8'. Did you mean 'int8'?"),
        (["--policies=turboquant(bits=5)"], "turboquant(bits) is 5.0; it must be one of"),
        (["--policies=oscar", "--config.model={folder}/bare"], "needs statistics of the model's"),
        (["--config.statistics=/none"], "There is no statistics file '/none'"),
        (["--config.statistics={folder}/other"], "belong to another model: their num_layers is 2, the model's is 4"),
        (["--prefix=10000"], "tokens, fewer than a row of 10032"),
        (["--tokens=0"], "--tokens is 0; it must be at least 1"),
        (["--held_out_share=1.5"], "--held_out_share is 1.5; it must be at least 1e-06 and at most 1.0"),
        (["--text=none.txt"], "There is no text 'none.txt'"),
        (["--text={folder}/latin1.txt"], "latin1.txt is not UTF-8"),
        (["--report={folder}"], "is a folder; give the path of a file"),
        (["--config.policy=ful", "--policy=int8"], "Unknown command line flag 'policy'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(program, text, tmp_path, argv, message):
    bare = ["statistics.safetensors"]
    shutil.copytree(ROOT / "models" / "tiny", tmp_path / "bare", ignore=lambda *_: bare)
    (tmp_path / "latin1.txt").write_bytes("déjà vu\n".encode("latin-1") * 100)
    other = tiny_config().cache_shape("float32")
    save_statistics(tmp_path / "other", Statistics(empty_statistics(other), other))
    given = [word.replace("{folder}", str(tmp_path)) for word in argv]
    code, out, err = program(f"--text={text}", *SIZES, "--policies=full", *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_rows_are_evenly_spaced_over_the_ends_of_texts(tmp_path):
    """The model's tokens are bytes: of 26 + 1 letters the last two thirds, twice, and rows from end to end of these."""
    paths = []
    for name, letters in (("one", string.ascii_lowercase), ("two", string.ascii_uppercase)):
        paths.append(str(tmp_path / name))
        (tmp_path / name).write_text(letters + "\n")
    tokenizer = load_tokenizer(find_checkpoint("models/tiny"))
    sizes = {"held_out_share": 2 / 3, "num_rows": 3, "row_tokens": 8}
    rows = evaluate.text_rows(paths, tokenizer, **sizes)
    assert rows.dtype == np.int32
    held = string.ascii_lowercase[9:] + "\n" + string.ascii_uppercase[9:] + "\n"
    assert [tokenizer.decode(row.tolist()) for row in rows] == [held[:8], held[14:22], held[28:]]
    with pytest.raises(UserError, match="have 36 tokens, fewer than a row of 37"):
        evaluate.text_rows(paths, tokenizer, **{**sizes, "row_tokens": 37})


@pytest.mark.slow
def test_policies_on_held_out_text(program, shared_data, tmp_path, record_property):
    """2,000 tokens that training never saw: what each policy may cost, and their order by divergence."""
    assert os.path.samefile(shared_data, find_checkpoint("../shared/data"))
    order = ["int8", *(f"turboquant(bits={bits})" for bits in (4, 3, 2, 1))]
    sketch = "turboquant(bits=4,prod=gaussian)"
    path = tmp_path / "report.json"
    code, _, err = program(f"--policies={';'.join([*order, 'int4', sketch])}", f"--report={path}", "--nospeed")
    assert (code, err) == (0, "")
    rows = {row["policy"]: row for row in json.loads(path.read_text())["rows"]}
    shown = ", ".join(f"{name} {row['kl_mean']:.5f} ({row['perplexity_change']:+.3%})" for name, row in rows.items())
    record_property("print", f"KL from full (change of perplexity) over 2,000 held-out tokens: {shown}")
    assert all(row["tokens"] == 2000 for row in rows.values())
    assert abs(rows["int8"]["perplexity_change"]) < 0.001
    assert abs(rows["int4"]["perplexity_change"]) < 0.01
    assert abs(rows["turboquant(bits=4)"]["perplexity_change"]) < 0.01
    divergences = [rows[name]["kl_mean"] for name in order]
    assert divergences == sorted(divergences)
    assert rows[sketch]["kl_mean"] > rows["turboquant(bits=3)"]["kl_mean"]
