"""Is one policy better than another? On examples that both have answered, task by task and together."""

import math
from typing import Any

import numpy as np

_NORMAL = 1.96  # 95 % of a normal distribution lie within so many deviations


def compare_policies(rows: list[dict[str, Any]], policy: str, rival: str) -> dict[str, Any]:
    """Compares two policies on the same examples.

    Args:
      rows: of an evaluation (`kvjax/evaluation.py`), with both on every task.
      policy: the one in question.
      rival: the other.

    Returns:
      `accuracy` and `rival_accuracy`, means over tasks; `difference` with its 95 % interval, `low` to `high`, from
      the differences of single examples (of tasks whose text is given, the agreement with `full` counts, which adds
      nothing to the interval); `kl` and `rival_kl`; `better`: 1, 0 or -1, by accuracy and then by divergence;
      `certain`: whether the interval leaves zero out; and `words`.
    """
    cells = dict.fromkeys((row["task"], row["question"]) for row in rows)
    by_name = {(row["task"], row["question"], row["policy"]): row for row in rows}
    pairs = [(by_name[*cell, policy], by_name[*cell, rival]) for cell in cells]
    accuracy, rival_accuracy = (float(np.mean([_right(pair[side]) for pair in pairs])) for side in (0, 1))
    divergence, rival_divergence = (float(np.mean([pair[side]["kl_mean"] for pair in pairs])) for side in (0, 1))
    half = _NORMAL * math.sqrt(sum(_variance(*pair) for pair in pairs)) / len(pairs)
    difference = accuracy - rival_accuracy
    better = int(np.sign(difference) or np.sign(rival_divergence - divergence))
    found = {"accuracy": accuracy, "rival_accuracy": rival_accuracy, "difference": difference}
    found |= {"low": difference - half, "high": difference + half, "kl": divergence, "rival_kl": rival_divergence}
    found |= {"policy": policy, "rival": rival, "better": better, "certain": abs(difference) > half}
    return {**found, "words": _words(found)}


def _right(row: dict[str, Any]) -> float:
    return row["accuracy"] if "accuracy" in row else row["top1_agreement"]


def _variance(row: dict[str, Any], rival: dict[str, Any]) -> float:
    """Of the mean difference between two rows of one task."""
    if "scores" not in row or len(row["scores"]) < 2:
        return 0.0
    differences = np.subtract(row["scores"], rival["scores"])
    return float(np.var(differences, ddof=1)) / len(differences)


def _words(found: dict[str, Any]) -> str:
    """The comparison as a sentence."""
    numbers = (
        f"{found['accuracy']:.1%} against {found['rival_accuracy']:.1%} (difference {found['difference']:+.1%}, 95 % "
        f"interval {found['low']:+.1%} to {found['high']:+.1%}), KL {found['kl']:.5f} against {found['rival_kl']:.5f}"
    )
    verb = {1: "is better than", 0: "is as good as", -1: "is worse than"}[found["better"]]
    doubt = "" if found["certain"] else " The difference of accuracy may be chance."
    return f"{found['policy']} {verb} {found['rival']}: {numbers}.{doubt}"
