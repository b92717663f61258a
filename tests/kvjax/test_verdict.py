"""Two policies on the same examples, against numbers by hand."""

import math

import pytest

from kvjax.verdict import compare_policies


def row(task, policy, scores, kl=0.1):
    found = {"task": task, "question": "inside", "policy": policy, "kl_mean": kl, "top1_agreement": 0.75}
    return {**found, "scores": scores, "accuracy": sum(scores) / len(scores)} if scores else found


def test_differences_are_taken_example_by_example():
    rows = [row("one", "a", [1.0, 1.0, 1.0, 0.0]), row("one", "b", [1.0, 0.0, 1.0, 0.0])]
    rows += [row("two", "a", [1.0, 1.0]), row("two", "b", [1.0, 1.0])]
    found = compare_policies(rows, "a", "b")
    assert (found["accuracy"], found["rival_accuracy"], found["difference"]) == (0.875, 0.75, 0.125)
    half = 1.96 * math.sqrt(0.25 / 4) / 2  # differences 0, 1, 0, 0 of the first task alone vary
    assert (found["low"], found["high"]) == (pytest.approx(0.125 - half), pytest.approx(0.125 + half))
    assert (found["better"], found["certain"]) == (1, False)
    assert found["words"].startswith("a is better than b: 87.5% against 75.0% (difference +12.5%")
    assert "may be chance" in found["words"]
    assert compare_policies(rows, "b", "a")["better"] == -1


def test_among_equals_the_one_of_less_divergence_is_better():
    rows = [row("one", "a", [1.0, 0.0], kl=0.2), row("one", "b", [1.0, 0.0], kl=0.1)]
    found = compare_policies(rows, "a", "b")
    assert (found["better"], found["certain"], found["difference"]) == (-1, False, 0.0)
    assert compare_policies(rows, "a", "a")["better"] == 0


def test_given_texts_count_by_agreement():
    rows = [row("ppl", "a", None), row("ppl", "b", None)]
    assert compare_policies(rows, "a", "b")["accuracy"] == 0.75
