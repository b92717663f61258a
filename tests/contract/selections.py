"""Every selection with arguments that suit the tiny model of two layers and budgets of a few dozen tokens."""

from pathlib import Path

PATTERN = Path(__file__).parent / "pattern.tsv"

ARGUMENTS = {
    "adakv": "queries=8",
    "criticalkv": "base=knorm",
    "duo": f"pattern={PATTERN}",
    "expected_attention": "future=64",
    "h2o": "",
    "keydiff": "",
    "knorm": "",
    "kvzip": "chunk=16",
    "lagkv": "lag=8",
    "pyramidkv": "queries=8",
    "quest": "page=8",
    "random": "",
    "rkv": "queries=4",
    "scissorhands": "",
    "snapkv": "queries=8",
    "streaming": "",
    "tova": "",
    "triattention": "",
}
"""Name -> arguments beside the budget. The contract has no other list: a selection that is not here fails."""

SINKS, WINDOW, ROUND, BUDGET = 2, 8, 8, 42
EXACT = f"exact(sinks={SINKS},window={WINDOW},round={ROUND})"


def policy_of(name, *terms, budget=BUDGET):
    """A policy of a selection, with the segment that suits tests."""
    given = [] if name == "duo" and budget == BUDGET else [f"budget={budget}"]
    arguments = ",".join([*given, *filter(None, [ARGUMENTS[name]])])
    return "+".join([f"{name}({arguments})", *terms, EXACT])
