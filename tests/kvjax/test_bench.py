"""The benchmark program: rows, peers that are there and that are not, mistakes."""

import json
import sys

import pytest

from kvjax import bench
from kvjax._program import run

PEER = """#!{python}
import json, sys
print(json.dumps({{"ready": {{"torch": "fake"}}}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"seconds_per_step": 7.0 * json.loads(line)["batch"]}}), flush=True)
"""


@pytest.fixture
def program(golden, capsys):
    def call(*argv):
        given = ["bench", *argv, f"--model={golden / 'transformers' / 'qwen3'}", "--new_tokens=3", "--repeats=2"]
        code = run(bench.main, usage="", define_flags=bench.define_flags, allows_words=True, argv=given)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def fake_python(tmp_path, text):
    """A program that stands where the peer's Python should be."""
    path = tmp_path / "python"
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_rows_of_ours_and_of_a_peer(program, tmp_path):
    report = tmp_path / "report.json"
    peer = fake_python(tmp_path, PEER)
    code, out, err = program(
        "decode", "--cases=1x20,2x9", "--against=transformers", f"--peer_python={peer}", f"--report={report}"
    )
    assert (code, err) == (0, "")
    assert "batch 2, context 9" in out
    record = json.loads(report.read_text())
    assert record["versions"]["torch"] == "fake"
    assert [(row["case"], row["name"]) for row in record["rows"]] == [
        ("batch 1, context 20", "full"),
        ("batch 1, context 20", "transformers"),
        ("batch 2, context 9", "full"),
        ("batch 2, context 9", "transformers"),
    ]
    ours, theirs = record["rows"][2:]
    assert (theirs["seconds_per_step"], ours["times_slower_than_first"]) == (14.0, 1.0)
    assert theirs["times_slower_than_first"] == pytest.approx(14.0 / ours["seconds_per_step"])
    assert ours["cache_bytes"] == 2 * (2 * 2 * 2 * 12 * 16 * 4 + 2 * 12 * 4)


def test_a_missing_peer_is_skipped_by_name(program, tmp_path):
    peer = fake_python(tmp_path, '#!{python}\nprint(\'{{"missing": "torch"}}\')\n')
    code, out, err = program("decode", "--cases=1x8", "--against=transformers", f"--peer_python={peer}")
    assert code == 0
    assert "skipped transformers:" in err
    assert "lacks torch. To install: pip install torch" in err
    assert "full" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "Name one benchmark: decode, rounds"),
        (["decod"], "Unknown benchmark 'decod'. Did you mean 'decode'?"),
        (["decode", "--against=torch"], "Unknown peer 'torch'"),
        (["decode", "--cases=1"], "The case '1' is not BATCHxCONTEXT"),
        (["decode", "--policies=fast"], "Unknown policy term 'fast'"),
        (["kernels", "--cases=1x100"], "wants contexts that are multiples of 32"),
        (["decode", "--against=transformers", "--peer_python=/nowhere"], "There is no Python '/nowhere'"),
    ],
)
def test_mistakes(program, argv, message):
    code, _, err = program(*argv)
    assert code == 2
    assert message in err


def test_rounds_are_measured_in_decode_steps(program):
    policy = "int8+exact(sinks=1,window=4,round=8)"
    code, out, err = program("rounds", "--cases=2x30", f"--policies={policy}")
    assert (code, err) == (0, "")
    assert "round / step" in out
    assert "int8+exact" in out
