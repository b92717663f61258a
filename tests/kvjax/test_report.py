"""The record of a run."""

import json

from kvjax.report import commit, new_report, write_json


def test_every_report_says_where_it_comes_from():
    report = new_report("kvjax.test", config={"a": 1}, policy="full")
    assert report["program"] == "kvjax.test"
    assert report["device"] == {"kind": "cpu", "platform": "cpu", "count": 8}
    assert report["versions"]["jax"]
    assert report["implementations"] == dict.fromkeys(("encode", "score", "select", "slots"), "reference")
    assert commit() is None or len(commit()) >= 12


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_json(path, {"one": "é"})
    write_json(path, {"two": 2})
    assert json.loads(path.read_text()) == {"two": 2}
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
