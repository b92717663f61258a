"""Words for every selection and every codec: what they stand for, and what becomes of combinations that cannot be."""

import json
from types import SimpleNamespace

import pytest

from kvjax import combinations, evaluate
from kvjax._program import run
from kvjax.codec import CODECS
from kvjax.combinations import Combinations, expand
from kvjax.errors import UserError
from kvjax.selection import SELECTIONS
from tests.tiny import write_checkpoint

EXACT = "exact(sinks=2,window=8,round=32)"


def names_of(found):
    return [str(policy) for policy in found.policies]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("int8", ["int8"]),
        ("CODECS", list(CODECS.names())),
        ("SELECTIONS(budget=64)", [f"{name}(budget=64)" for name in SELECTIONS.names()]),
        ("h2o(budget=64)+key(CODECS)", [f"h2o(budget=64)+key({name})" for name in CODECS.names()]),
        ("key(CODECS)+value(CODECS)", [f"key({name})+value({name})" for name in CODECS.names()]),
        (
            "SELECTIONS(budget=64)+CODECS+edges(1)",
            [f"{one}(budget=64)+{two}+edges(1)" for one in SELECTIONS.names() for two in CODECS.names()],
        ),
        ("nf(table=CODECS.json)", ["nf(table=CODECS.json)"]),
        ("nf(table=/tables/CODECS/levels)", ["nf(table=/tables/CODECS/levels)"]),
        ("MYCODECS", ["MYCODECS"]),
        ("codecs", ["codecs"]),
    ],
)
def test_what_a_string_stands_for(text, wanted):
    assert expand(text) == wanted


def test_each_policy_comes_once_in_the_order_asked_for():
    found = Combinations(f"int8+{EXACT};CODECS+{EXACT};int8+{EXACT};full")
    rest = [name for name in CODECS.names() if name not in ("int8", "lowrank")]
    assert names_of(found) == [f"int8+{EXACT}", *(f"{name}+{EXACT}" for name in rest), "full"]
    assert list(found.refused) == [f"lowrank+{EXACT}"]  # it needs an argument


def test_what_cannot_be_is_refused_with_the_reason():
    text = f"SELECTIONS(budget=64)+lowrank(rank=8,rope=pre)+{EXACT}"
    found = Combinations(f"{text};knorm(budget=64)+{EXACT}")
    assert f"knorm(budget=64)+{EXACT}" in names_of(found)
    reasons = {name.split("(")[0]: reason for name, reason in found.refused.items()}
    assert "duo(pattern=FILE)" in reasons["duo"]
    assert "use heads(uniform)" in reasons["adakv"]
    assert all("\n" not in reason for reason in reasons.values())
    assert set(expand(text)) == {name for name in [*names_of(found), *found.refused] if "lowrank" in name}


def test_a_policy_that_was_typed_is_right_or_ends_the_run():
    with pytest.raises(UserError, match="Unknown policy term 'in8'"):
        Combinations("CODECS;in8")


def test_a_string_of_which_nothing_is_right_ends_the_run():
    with pytest.raises(UserError, match="Unknown argument of adakv 'budgte'"):
        Combinations("int8;SELECTIONS(budgte=64)")


def test_a_check_takes_combinations_out_and_raises_for_policies():
    def check(policy):
        if "int4" in str(policy):
            raise UserError("No int4 here.")

    found = Combinations(f"CODECS+{EXACT}")
    found.check(check)
    assert names_of(found) == [f"{name}+{EXACT}" for name in CODECS.names() if name not in ("int4", "lowrank")]
    assert found.refused[f"int4+{EXACT}"] == "No int4 here."
    with pytest.raises(UserError, match=r"No int4 here\."):
        Combinations(f"int4+{EXACT};CODECS+{EXACT}").check(check)


def test_a_run_has_rows_and_reasons(tmp_path, capsys, monkeypatch):
    """Two codecs stand for all: one combination runs and is compiled once, of the other the run says why it cannot."""
    monkeypatch.setitem(combinations._WORDS, "CODECS", SimpleNamespace(names=lambda: ("int8", "turboquant")))
    segment = "exact(sinks=2,window=8,round=8)"
    write_checkpoint(tmp_path / "model")
    code = run(
        evaluate.main,
        usage=evaluate.__doc__,
        default_config="configs/tiny_cpu.py",
        define_flags=evaluate.define_flags,
        argv=[
            "evaluate",
            f"--model={tmp_path / 'model'}",
            "--tasks=ppl(tokens=96,scored=32,file=README.md,held_out=1)",
            f"--policies=knorm(budget=48)+CODECS(bits=4)+{segment}",
            f"--output={tmp_path / 'run'}",
            "--examples=2",
            "--quiet",
        ],
    )
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    row = next(row for row in report["rows"] if row["policy"].startswith("knorm"))
    assert row["policy"] == f"knorm(budget=48)+turboquant(bits=4)+{segment}"
    assert row["compilations"] == 1
    assert row["evicted"] > 0
    ((name, reason),) = report["refused"].items()
    assert name == f"knorm(budget=48)+int8(bits=4)+{segment}"
    assert reason.startswith("Unknown argument of int8 'bits'")
    assert f"| `{name}` | {reason} |" in (tmp_path / "run" / "table.md").read_text()
    assert "Refused" in printed.out
