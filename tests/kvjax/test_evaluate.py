"""The program that evaluates policies: what it leaves, interrupts, mistakes, and held-out text."""

import json
import os
import shutil

import numpy as np
import pytest

from kvjax import evaluate
from kvjax._program import run
from kvjax.errors import UserError
from kvjax.folder import find_checkpoint
from kvjax.pictures import read_trace
from kvjax.pictures.style import THEMES
from kvjax.statistics import Statistics, empty_statistics
from kvjax.statistics_file import save_statistics
from models import load_model
from tests.tiny import tiny_config, tiny_model, write_checkpoint

EXACT = "exact(sinks=2,window=8,round=8)"
COPY, NEEDLE = "copy(tokens=90,length=20)", "needle(tokens=100)"
TEXT = "ppl(tokens=50,scored=30,file=LICENSE,held_out=1.0)"
CODED = f"int2+{EXACT}"
SIZES = ("--examples=4", "--batch=4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model whose tokens are bytes and symbols."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder)
    return folder


@pytest.fixture
def program(capsys, checkpoint):
    """Runs the program; gives exit code, standard output and standard error."""

    def call(*argv, model=f"--model={checkpoint}"):
        code = run(
            evaluate.main,
            usage=evaluate.__doc__,
            default_config="configs/tiny_cpu.py",
            define_flags=evaluate.define_flags,
            argv=["evaluate", *filter(None, [model]), *argv],
        )
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def rows_of(folder):
    return json.loads((folder / "report.json").read_text())["rows"]


def without_seconds(rows):
    """Rows without what differs from run to run; what compiles depends on what ran before."""
    apart = ("seconds", "tokens_per_second", "compilations")
    return [{name: value for name, value in row.items() if name not in apart} for row in rows]


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
def test_report_table_and_answers_of_a_run(program, tmp_path):
    """Full and the companions beside what was asked for, answers and a text, speeds and pictures."""
    folder = tmp_path / "new" / "run"
    asked = f"knorm(budget=34)+{EXACT}"
    code, out, err = program(f"--tasks={COPY};{TEXT}", f"--policies={asked}", f"--output={folder}", *SIZES)
    assert (code, err) == (0, "")
    report = json.loads((folder / "report.json").read_text())
    wanted = "program commit date device versions config policy implementations settings concentration rows"
    assert set(wanted.split()) <= report.keys()
    assert (report["program"], report["policy"], report["concentration"]) == ("kvjax.evaluate", asked, None)
    assert {"examples": 4, "batch": 4, "seed": 2}.items() <= report["settings"].items()
    policies = ["full", *(f"{name}(budget=34)+{EXACT}" for name in ("random", "streaming", "oracle")), asked]
    cells = [(task, "inside", policy) for task in (COPY, TEXT) for policy in policies]
    assert [(row["task"], row["question"], row["policy"]) for row in report["rows"]] == cells
    wanted = (
        "examples tokens perplexity perplexity_change kl_mean kl_p999 top1_agreement cache_bytes full_cache_bytes "
        "stated_bytes device_bytes key_bits value_bits ratio_to_dtype ratio_to_bfloat16 max_tokens evicted layers"
    )
    for row in report["rows"]:
        assert set(wanted.split()) <= row.keys()
        assert row["tokens_per_second"] > 0
        assert row["seconds"] > 0
        answered = {"accuracy", "accuracy_low", "accuracy_high", "agreement", "scores"}
        assert answered & row.keys() == (answered if row["task"] == COPY else set())
    files = sorted((folder / "answers").iterdir())
    assert len(files) == len(policies)  # a text has no answers
    for path in files:
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(answers) == 4
        assert all(one["expected"].endswith("[END]") for one in answers)
    head, table = (folder / "table.md").read_text().split("\n\n", 1)
    assert head.startswith("`python -m kvjax.evaluate")
    assert report["device"]["kind"] in head
    assert table.startswith(f"### {COPY}, question inside: 4 examples, 128 tokens of room\n")
    assert f"### {TEXT}: 4 examples" in table
    for policy in policies:
        assert table.count(f"| `{policy}` |") == 2
        assert out.count(f"\n│ {policy} ") == 2
    assert "full below 0.95: says nothing" in out  # nobody has taught this model
    pictures = [folder / "pictures" / f"{name}.{shade}.svg" for name in ("accuracy", "kept") for shade in THEMES]
    assert all("<svg" in path.read_text() for path in pictures)
    assert out.endswith("".join(f"{path}\n" for path in pictures))
    assert read_trace(folder).policy == asked


@pytest.fixture
def evaluated(monkeypatch):
    """The cells that are evaluated, in order; the one that is put into `stop` is interrupted."""

    class Spy(evaluate.Evaluator):
        def evaluate(self, cell, policy):
            calls.append((cell.task.name, str(policy)))
            if calls[-1] in stop:
                raise KeyboardInterrupt
            return super().evaluate(cell, policy)

    calls, stop = [], []
    monkeypatch.setattr(evaluate, "Evaluator", Spy)
    return calls, stop


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
def test_an_interrupted_run_goes_on_where_it_stopped(program, tmp_path, evaluated):
    """Done in two runs, it leaves what one leaves; done once more, it does nothing; a policy more is added."""
    calls, stop = evaluated
    argv = (f"--tasks={NEEDLE};{COPY}", f"--policies={CODED}", *SIZES, "--nospeed", "--nopictures")
    once, twice = tmp_path / "once", tmp_path / "twice"
    code, whole, err = program(*argv, f"--output={once}")
    assert (code, err) == (0, "")
    assert calls == [(task, policy) for task in (NEEDLE, COPY) for policy in ("full", CODED)]

    calls.clear()
    stop.append((COPY, CODED))
    assert program(*argv, f"--output={twice}") == (130, "", "interrupted\n")
    assert [(row["task"], row["policy"]) for row in rows_of(twice)] == [
        (NEEDLE, "full"),
        (NEEDLE, CODED),
        (COPY, "full"),
    ]
    assert not (twice / "table.md").exists()
    stop.clear()
    calls.clear()
    code, out, err = program(*argv, f"--output={twice}")
    assert (code, err, out) == (0, "", whole)
    assert calls == [(COPY, "full"), (COPY, CODED)]  # full again, for what the other is compared with
    assert without_seconds(rows_of(twice)) == without_seconds(rows_of(once))
    tables = [(folder / "table.md").read_text().split("\n\n", 1)[1] for folder in (once, twice)]
    assert tables[0] == tables[1]

    calls.clear()
    assert program(*argv, f"--output={twice}") == (0, whole, "")
    assert calls == []
    more = (f"--tasks={NEEDLE}", f"--policies={CODED};int8+{EXACT}", *argv[2:], f"--output={twice}")
    code, out, _ = program(*more)
    assert code == 0
    assert calls == [(NEEDLE, "full"), (NEEDLE, f"int8+{EXACT}")]
    assert rows_of(twice)[-1]["compilations"] == 1  # full's are not counted
    assert len(rows_of(twice)) == 5
    assert "copy" not in out


@pytest.mark.slow
@pytest.mark.usefixtures("let_go")
def test_both_places_of_the_question_and_nothing_written_without_output(program, tmp_path, monkeypatch, evaluated):
    """And compiled functions are let go after so many policies: a process may not keep those of a hundred."""
    monkeypatch.chdir(tmp_path)
    calls, cleared = evaluated[0], []
    monkeypatch.setattr(evaluate, "_MOST_COMPILED", 2)
    monkeypatch.setattr(evaluate.jax, "clear_caches", lambda: cleared.append(len(calls)))
    policies = f"--policies=streaming(budget=26)+{EXACT}"
    argv = (f"--tasks={NEEDLE}", policies, "--questions=inside,after", *SIZES, "--nospeed")
    code, out, err = program(*argv)
    assert (code, err) == (0, "")
    for place in ("inside", "after"):
        assert f"{NEEDLE}, question {place}: 4 examples, 128 tokens of room" in out
    assert len(calls) == 2 * 4  # full, random, streaming, and the oracle
    assert cleared == [2, 4]  # the other four steps are compiled already
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Folders that are no output of this run, and models and files that do not suit."""
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.txt").write_text("mine")
    for name, content in (("broken", "{"), ("list", "[]"), ("decode", '{"program": "kvjax.decode"}')):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(content)
    (folder / "other").mkdir()
    (folder / "other" / "report.json").write_text(json.dumps({"settings": {"examples": 7}, "rows": []}))
    (folder / "file").write_text("")
    write_checkpoint(folder / "bytes", symbols=())
    shape = tiny_config().cache_shape("float32")
    save_statistics(folder / "statistics", Statistics(empty_statistics(shape), shape))
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=nedle"], "Unknown task 'nedle'. Did you mean 'needle'?"),
        (["--tasks=needle(token=100)"], "Unknown argument of needle 'token'. Did you mean 'tokens'?"),
        (["--tasks= ;"], "--tasks names no task"),
        (["--tasks=ppl(file=none.txt)"], "There is no text 'none.txt'"),
        (["--policies=int8;in8"], "Unknown policy term 'in8'. Did you mean 'int8'?"),
        (["--policies=oracle(budget=64)"], "Unknown policy term 'oracle'"),
        (["--policies=turboquant(bits=5)"], "turboquant(bits) is 5.0; it must be one of"),
        (["--policies=oscar"], "needs statistics of the model's"),
        (["--policies=int8+edges(1)"], "leaves none of the model's 1 layers"),
        (["--questions=inside,afte"], "Unknown place of the question 'afte'. Did you mean 'after'?"),
        (["--questions="], "Unknown place of the question ''. Known: after, inside"),
        (
            [f"--tasks={TEXT}", f"--policies=random(budget=34)+prompt(8)+{EXACT}"],
            "A prompt of 50 tokens is longer than",
        ),
        (["--examples=0"], "--examples is 0; it must be at least 1"),
        (["--batch=0"], "--batch is 0; it must be at least 1"),
        (["--seed=-1"], "--seed is -1; it must be at least 0"),
        (["--examples=many"], "flag --examples=many"),
        (["--model={folder}/bytes"], f"The task '{NEEDLE}' is written in symbols, and the model's tokenizer has no"),
        (["--model={folder}/nowhere"], "There is no checkpoint folder"),
        (["--config.statistics={folder}/none"], "There is no statistics file"),
        (["--config.statistics={folder}/statistics"], "belong to another model: their num_layers is 2, the model's is"),
        (["--output={folder}/foreign"], "foreign is not empty and holds no report.json of this program"),
        (["--output={folder}/broken"], "report.json is no report of this program; give another --output."),
        (["--output={folder}/list"], "report.json is no report of this program"),
        (["--output={folder}/decode"], "report.json is no report of this program"),
        (["--output={folder}/other"], "holds a run with other settings (batch, chat, dtype, examples, model, seed,"),
        (["--output={folder}/file"], "file is not a folder that can be written to"),
        (["word"], "Unexpected argument 'word'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(program, faulty, argv, message):
    given = [word.replace("{folder}", str(faulty)) for word in argv]
    code, out, err = program(f"--tasks={NEEDLE}", f"--policies={CODED}", *SIZES, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


REPORT = {
    "settings": {"model": "m", "examples": 4, "weights": "abc"},
    "date": "2026-01-02T03:04:05",
    "commit": "c0ffee",
}
REPORT |= {"device": {"kind": "cpu"}}
ROW = {"task": 'jsonl(file="a b/c.jsonl")', "question": "inside", "policy": CODED}


def test_a_folder_keeps_rows_as_they_come(tmp_path):
    """Answers first, so that a row that is there has them."""
    path = tmp_path / "run"
    folder = evaluate.Folder(path, REPORT)
    assert not path.exists()
    assert folder.row(*ROW.values()) is None
    folder.add(ROW, [{"output": "ö"}, {"output": "b"}])
    assert folder.row(*ROW.values()) == ROW
    (answers,) = (path / "answers").iterdir()
    assert answers.name == f"jsonl(file=_a_b_c.jsonl_).inside.{CODED}.jsonl"
    assert answers.read_text(encoding="utf-8") == '{"output": "ö"}\n{"output": "b"}\n'
    folder.add({**ROW, "question": "after"}, [])
    assert len(list((path / "answers").iterdir())) == 1
    again = evaluate.Folder(path, {**REPORT, "date": "2026-02-03T04:05:06"})
    assert again.report["rows"] == [ROW, {**ROW, "question": "after"}]
    assert again.report["date"] == "2026-02-03T04:05:06"


def test_a_folder_of_other_settings_is_named_by_what_differs(tmp_path):
    evaluate.Folder(tmp_path, REPORT).add(ROW, [])
    other = {**REPORT, "settings": {"model": "m", "examples": 8, "weights": "abd"}}
    with pytest.raises(
        UserError, match=r"holds a run with other settings \(examples, weights\); give another --output"
    ):
        evaluate.Folder(tmp_path, other)


def test_an_empty_folder_will_do_and_none_keeps_rows_in_memory(tmp_path):
    assert evaluate.Folder(tmp_path, REPORT).report["rows"] == []
    folder = evaluate.Folder(None, REPORT)
    folder.add(ROW, [{"output": "a"}])
    folder.finish([], command="")
    assert folder.row(*ROW.values()) == ROW
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_that_of_the_weights(checkpoint, tmp_path):
    found = evaluate.fingerprint(checkpoint)
    assert len(found) == 12
    shutil.copytree(checkpoint, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("the same weights")
    assert evaluate.fingerprint(tmp_path / "copy") == found
    data = bytearray((tmp_path / "copy" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "copy" / "model.safetensors").write_bytes(data)
    assert evaluate.fingerprint(tmp_path / "copy") != found


def test_a_checkpoint_of_the_tests_is_the_model_that_it_came_from(checkpoint):
    ours, theirs = load_model(checkpoint), tiny_model(layers=1, vocab_size=384)
    np.testing.assert_array_equal(ours.embedding[...], theirs.embedding[...])


@pytest.mark.slow
@pytest.mark.optimised
def test_policies_on_held_out_text(program, shared_data, tmp_path, record_property):
    """2,000 tokens that training never saw: what each policy may cost, and their order by divergence."""
    assert os.path.samefile(shared_data, find_checkpoint("../shared/data"))
    order = ["int8", *(f"turboquant(bits={bits})" for bits in (4, 3, 2, 1))]
    sketch = "turboquant(bits=4,prod=gaussian)"
    argv = ("--tasks=ppl(tokens=512,scored=500)", "--examples=4", "--nospeed", "--nopictures", f"--output={tmp_path}")
    code, _, err = program(f"--policies={';'.join([*order, 'int4', sketch])}", *argv, model=None)
    assert (code, err) == (0, "")
    rows = {row["policy"]: row for row in rows_of(tmp_path)}
    shown = ", ".join(f"{name} {row['kl_mean']:.5f} ({row['perplexity_change']:+.3%})" for name, row in rows.items())
    record_property("print", f"KL from full (change of perplexity) over 2,000 held-out tokens: {shown}")
    assert all(row["tokens"] == 2000 for row in rows.values())
    assert abs(rows["int8"]["perplexity_change"]) < 0.001
    assert abs(rows["int4"]["perplexity_change"]) < 0.01
    assert abs(rows["turboquant(bits=4)"]["perplexity_change"]) < 0.01
    divergences = [rows[name]["kl_mean"] for name in order]
    assert divergences == sorted(divergences)
    assert rows[sketch]["kl_mean"] > rows["turboquant(bits=3)"]["kl_mean"]
