"""An example of a task as the prompt of a run: its tokens, where its answer ends, and whether an answer is right."""

import dataclasses
from typing import Any

from kvjax.errors import UserError, check_between
from kvjax.material import check_symbols, material_for
from kvjax.task import Example, Task, example_of
from kvjax.text import Tokenizer

_SEED = 2  # that of kvjax.evaluate, whose examples these are; training and calibration have others
_MANY = 1 << 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Posed:
    """A problem that a model can be given.

    Attributes:
      task: the task.
      index: the example's number.
      example: the example.
      tokens: token ids of context and question.
      stop_tokens: the task's own ends of an answer.
    """

    task: Task
    index: int
    example: Example
    tokens: list[int]
    stop_tokens: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task.name}, example {self.index}"

    @property
    def text(self) -> str:
        """The prompt."""
        return self.example.context + self.example.question

    def record(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"name": self.task.name, "example": self.index, "expected": self.example.answer}

    def score(self, answer: str) -> float:
        """How right an answer is, 0 to 1."""
        return self.task.score(answer, self.example)

    def verdict(self, score: float, *, says_expected: bool = True) -> str:
        """Whether an answer with that score is right, and what was expected where it is not."""
        if score >= 1:
            return "right"
        said = "wrong" if score <= 0 else f"partly right ({score:.2f})"
        return f"{said}, expected {self.example.answer}" if says_expected else said


def check_posable(task: Task, *, index: int) -> None:
    """Raises `UserError` unless a task has answers to generate and an example of that number."""
    if task.forced:
        raise UserError(
            f"The task '{task.name}' scores a text that is given, so there is nothing to decode: use "
            "python -m kvjax.evaluate."
        )
    check_between("config.task_example", index, 0, (task.num_examples or _MANY) - 1)


def pose(task: Task, tokenizer: Tokenizer, *, index: int, chat: bool) -> Posed:
    """Makes an example of a task, the one that `kvjax.evaluate` has under that number.

    Args:
      task: the task.
      tokenizer: the model's.
      index: the example's number.
      chat: put tasks in words through the chat template.

    Raises:
      UserError: the tokenizer lacks the task's symbols, the arguments cannot be met, or a file is missing.
    """
    check_posable(task, index=index)
    check_symbols(task, tokenizer)
    material = material_for(task, tokenizer, chat=chat)
    example = example_of(task, material, seed=_SEED, index=index)
    context = tokenizer.encode(example.context, add_special_tokens=material.chat is None)
    return Posed(
        task=task,
        index=index,
        example=example,
        tokens=context + tokenizer.encode(example.question, add_special_tokens=False),
        stop_tokens=tuple(tokenizer.encode(task.stop, add_special_tokens=False)) if task.stop else (),
    )
