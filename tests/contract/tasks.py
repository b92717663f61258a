"""Every task with arguments that suit tests, and what its examples are made of."""

import functools
from pathlib import Path

from kvjax.filler import sentences
from kvjax.symbols import num_tokens
from kvjax.task import TASKS, Material, example_of
from tests.wordings import MATERIAL

PROBLEMS = Path(__file__).resolve().parent.parent / "problems"
ARGUMENTS = {
    "dormant": {"tokens": 128, "distance": 64},
    "gsm8k": {"file": str(PROBLEMS / "gsm8k.jsonl")},
    "jsonl": {"file": str(PROBLEMS / "own.jsonl")},
    "math500": {"file": str(PROBLEMS / "math500.json")},
    "ppl": {"tokens": 64, "scored": 64, "file": "LICENSE", "held_out": 1.0},
}
"""Name -> arguments of tasks that do not go through the contract as they are by default."""


def task_of(name, **arguments):
    """The task of that name."""
    return TASKS.get(name)(**(ARGUMENTS.get(name, {}) | arguments))


def material_of(name):
    """Symbols for the tasks that are made of them, words for others."""
    if TASKS.get(name).symbols:
        return Material(filler=sentences, count=num_tokens)
    return MATERIAL


@functools.cache
def example(name, *, seed=0, index=0):
    """One of its examples."""
    return example_of(task_of(name), material_of(name), seed=seed, index=index)
