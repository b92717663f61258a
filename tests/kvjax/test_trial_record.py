"""The record of a search: what was judged is known again; another search's record is refused."""

import json

import pytest

from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.search import Score, Trial
from kvjax.trial_record import TrialRecord

HEAD = {"program": "kvjax.tune", "settings": {"seed": 3, "cells": ("copy, inside",)}}
SCORE = Score(accuracy=0.5, kl=0.1, step=0.01, tasks={"copy, inside": {"accuracy": 0.5, "kl": 0.1}})


def trial(policy):
    return Trial(policy=policy, kind="codec", choices={"keys": policy}, bytes_per_token=8.0, score=SCORE)


def test_trials_and_rows_are_known_again(tmp_path):
    path = tmp_path / "new" / "report.json"
    record = TrialRecord(path, HEAD)
    assert record.score(parse_policy("int8")) is None
    record.add_trial(trial("int8"))
    record.add_row({"task": "copy", "question": "inside", "policy": "int8", "accuracy": 0.5})
    again = TrialRecord(path, HEAD)
    assert again.score(parse_policy("int8")) == SCORE
    assert again.row("copy", "inside", "int8")["accuracy"] == 0.5
    assert again.row("copy", "after", "int8") is None
    again.add_trial(trial("int8"))
    again.add_trial(trial("int4"))
    again.finish(limit=9.0)
    written = json.loads(path.read_text())
    assert [one["policy"] for one in written["trials"]] == ["int8", "int4"]
    assert (written["limit"], len(written["rows"]), written["program"]) == (9.0, 1, "kvjax.tune")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is no record of this program"),
        ("{", "is no record of this program"),
        (json.dumps({"settings": {"seed": 4}, "trials": [], "rows": []}), r"other settings \(cells, seed\)"),
    ],
)
def test_records_of_others_are_refused(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        TrialRecord(path, HEAD)
    assert path.read_text() == text
