"""What a search came to in words and numbers."""

from rich.console import Console

from kvjax.search import Found, Score, Trial
from kvjax.tune_summary import Summary
from kvjax.verdict import compare_policies

MIXED, CODEC = "keydiff(budget=0.5)+int4", "int4"


def trial(policy, kind, accuracy, size):
    score = Score(accuracy=accuracy, kl=0.25, step=0.01, tasks={})
    return Trial(policy=policy, kind=kind, choices={}, bytes_per_token=size, score=score)


def row(policy, accuracy):
    named = {"task": "copy", "question": "inside", "policy": policy, "examples": 2, "accuracy": accuracy}
    return {**named, "kl_mean": 0.25, "top1_agreement": 0.75, "scores": [accuracy, accuracy]}


def summary(*trials):
    rows = [row("full", 1.0), row(MIXED, 0.9), row(CODEC, 0.8)]
    verdicts = [compare_policies(rows, MIXED, CODEC)]
    sizes = {"full": 110.0, MIXED: 10.0, CODEC: 20.0}
    return Summary(
        found=Found(trials=list(trials)),
        rows=rows,
        verdicts=verdicts,
        limit=25.0,
        sizes=lambda policy: (sizes[str(policy)], 100.0),
    )


def test_the_report_and_the_config_say_what_won():
    found = summary(trial(CODEC, "codec", 0.5, 20.0), trial(MIXED, "mixed", 0.75, 10.0))
    facts = found.facts()
    assert (facts["policy"], facts["bytes_per_token"], facts["front"]) == (MIXED, 10.0, [MIXED])
    head = {"settings": {"cells": ["copy, inside"]}, "date": "2026-11-25T12:00:00", "commit": "abc"}
    head["device"] = {"kind": "cpu"}
    notes = "\n".join(found.notes(head, command="python -m kvjax.tune --ratio=4"))
    for words in (
        "Found on 2026-11-25 at commit abc, cpu, by\n    python -m kvjax.tune --ratio=4",
        "best of 2 policies",
        "10.00 times less",
        f"100.0%  0.25000      110.0  full\n      90.0%  0.25000       10.0  {MIXED}",
    ):
        assert words in notes
    assert found.sentences() == [f"Held-out half: {found.verdicts[0]['words']}"]


def test_a_winner_that_is_one_codec_alone_is_said_to_be_so(capsys):
    found = summary(trial(CODEC, "codec", 0.5, 20.0), trial(MIXED, "mixed", 0.25, 10.0))
    assert found.sentences()[0] == "The best policy that was found is one codec alone."
    Console(width=100).print(found.table())
    shown = capsys.readouterr().out
    assert shown.index(MIXED) < shown.index("10.0 ") < shown.index("50.0%")
