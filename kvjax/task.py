"""Tasks: problems with a right answer, made from a seed and scored without a model.

    context                      question            answer
    what is read, and kept ...   what is asked       what a right model generates, up to the task's stop

A task is static and hashable, one file in `kvjax/tasks/`; its fields are the arguments of the string that people type,
`needle(tokens=512,depth=0.5)`. The question is apart from the context, so that a cache can be compressed before anybody
knows what will be asked. A task knows no model: its texts are made of symbols that a tokenizer must have as single
tokens (`kvjax/symbols.py`), or of words that any tokenizer takes.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from kvjax.errors import UserError
from kvjax.registry import Registry

TASKS: Registry = Registry("task", package="kvjax.tasks")
"""Name -> subclass of `Task`; see `kvjax/tasks/`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One problem.

    Attributes:
      context: what is read first.
      question: what is asked about it; may be empty.
      answer: the right answer, as text.
      facts: numbers that tell examples of a task apart, e.g. the depth of a needle.
      more: further questions and their answers, (question, answer) each, to learn from.
    """

    context: str
    question: str
    answer: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Material:
    """What examples are made of.

    Attributes:
      filler: (generator, n) -> text of n tokens that means nothing.
      count: tokens of a text.
      chat: a user's words -> the prompt of a conversation; None for models without a chat template.
    """

    filler: Callable[[np.random.Generator, int], str]
    count: Callable[[str], int]
    chat: Callable[[str], str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What every task has; a subclass adds its arguments.

    Attributes:
      tokens: of context and question together.
    """

    symbols: ClassVar[tuple[str, ...]] = ()
    """Texts that must be single tokens."""
    stop: ClassVar[str] = ""
    """Text of the token that ends an answer, beside the model's own; empty for none."""
    forced: ClassVar[bool] = False
    """Whether the answer is given rather than generated, and its likelihood is what counts."""

    tokens: int = 256

    @property
    def name(self) -> str:
        """The task as people type it, with the arguments that are not the defaults."""
        named = next(name for name in TASKS.names() if TASKS.get(name) is type(self))
        fields = dataclasses.fields(self)
        changed = [f"{one.name}={getattr(self, one.name)}" for one in fields if getattr(self, one.name) != one.default]
        return f"{named}({','.join(changed)})" if changed else named

    @property
    def new_tokens(self) -> int:
        """Most tokens of an answer."""
        raise NotImplementedError

    @property
    def num_examples(self) -> int | None:
        """How many examples there are; None for as many as one likes."""
        return None

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """One problem.

        Args:
          rng: decides it.
          material: filler, and how tokens are counted.
          index: its number in the run, for tasks that take their problems from a file.
          more: further questions about the same context, for tasks that have some.

        Raises:
          UserError: the arguments cannot be met, or a file is missing.
        """
        raise NotImplementedError

    def score(self, output: str, example: Example) -> float:
        """How right an answer is, 0 to 1."""
        raise NotImplementedError


def example_of(task: Task, material: Material, *, seed: int, index: int) -> Example:
    """The example of that number; the same for the same task, seed and number."""
    return task.example(np.random.default_rng((seed, index)), material, index=index)


def check_fits(task: Task, needed: int) -> None:
    """Raises `UserError` if a task's pieces take more than its tokens."""
    if needed > task.tokens:
        raise UserError(f"{task.name} has {task.tokens} tokens, and what it holds takes {needed}: raise tokens.")
