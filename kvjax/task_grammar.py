"""The language of tasks: NAME or NAME(argument=value, ...), read into a `Task`.

needle   niah(tokens=8192,depth=0.5)   jsonl(file="my problems.jsonl",match=contains)
"""

from typing import Any

from kvjax.errors import UserError
from kvjax.task import TASKS, Task
from kvjax.terms import convert_arguments, read_term, split_list


def parse_task(text: Any) -> Task:
    """Reads a task from the string that people type.

    Args:
      text: e.g. "needle(tokens=512,depth=0.5)"; arguments are the fields of the task. A `Task` is returned as it is.

    Raises:
      UserError: the task or an argument is unknown, or a value is out of range, with the nearest that would do.
    """
    if isinstance(text, Task):
        return text
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"A task is a string such as 'needle' or 'niah(tokens=4096)', not {text!r}.")
    name, positional, named = read_term(text, kind="task", joint=",")
    make = TASKS.get(name)
    if positional:
        raise UserError(f"{name} takes arguments by name, e.g. {name}(tokens=512); '{positional[0]}' has none.")
    return make(**convert_arguments(name, make, named))


def split_tasks(text: str) -> list[str]:
    """Splits a list of tasks at commas and semicolons outside parentheses and quotes."""
    return split_list(text)
