"""Terms: NAME or NAME(value, argument=value, ...), the shape in which people type policies and tasks.

A value that holds commas, parentheses or the like stands in double quotes: `jsonl(file="a, b.jsonl")`.
"""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from kvjax.errors import UserError, unknown

_TERM = re.compile(r'\s*(\w+)\s*(?:\(((?:"[^"]*"|[^()"])*)\))?\s*$')
_NEEDS_QUOTES = re.compile(r"[,;()=+\s]|^$")


class Term(NamedTuple):
    """A term, its values as text.

    Attributes:
      name: its word.
      positional: values without a name, in order.
      named: argument -> value.
    """

    name: str
    positional: list[str]
    named: dict[str, str]

    def __str__(self) -> str:
        """The term in its plain spelling."""
        named = [f"{key}={_quoted(value)}" for key, value in self.named.items()]
        arguments = [*map(_quoted, self.positional), *named]
        return f"{self.name}({','.join(arguments)})" if arguments else self.name


def split_outside(text: str, separators: str) -> list[str]:
    """The pieces of a text between separators that stand outside parentheses and quotes."""
    pieces, depth, quoted = [""], 0, False
    for character in text:
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth = max(depth + (character == "(") - (character == ")"), 0)
            if character in separators and not depth:
                pieces.append("")
                continue
        pieces[-1] += character
    return pieces


def split_list(text: str) -> list[str]:
    """Splits a list of policies or tasks at commas and semicolons outside parentheses and quotes."""
    return [piece.strip() for piece in split_outside(text, ",;") if piece.strip()]


def read_term(text: str, *, kind: str, joint: str) -> Term:
    """Reads one term.

    Args:
      text: e.g. "turboquant(bits=4)".
      kind: what it should be, for the message, e.g. "term of a policy".
      joint: what stands between two of them, for the message.

    Raises:
      UserError: it has another shape, or gives an argument twice.
    """
    match, shown = _TERM.match(text), " ".join(text.split())
    if not match:
        raise UserError(f"'{shown}' is no {kind}: write NAME or NAME(argument=value, ...), joined by '{joint}'.")
    positional, named = [], {}
    for argument in filter(None, (piece.strip() for piece in split_outside(match.group(2) or "", ","))):
        key, *value = (half.strip() for half in argument.split("=", 1))
        if not value or argument.startswith('"'):
            positional.append(_unquoted(argument))
        elif key in named:
            raise UserError(f"'{shown}' gives {key} twice.")
        else:
            named[key] = _unquoted(value[0])
    return Term(match.group(1), positional, named)


def convert_arguments(
    name: str, function: Callable, named: dict[str, str], *, hidden: Collection[str] = ()
) -> dict[str, Any]:
    """Values as the types that a function's signature asks for.

    Args:
      name: of the term, for messages.
      function: takes the arguments by name; int, float, int | float, bool and str are what it may ask for.
      named: argument -> its text.
      hidden: parameters that are no arguments of the term.

    Raises:
      UserError: an argument is unknown, with the nearest, or its text is no value of the type.
    """
    parameters = inspect.signature(function).parameters
    wanted = {key: parameter.annotation for key, parameter in parameters.items() if key not in hidden}
    converted = {}
    for key, value in named.items():
        if key not in wanted:
            raise unknown(f"argument of {name}", key, wanted)
        convert = {int | float: _number, bool: _truth}.get(wanted[key], wanted[key])
        try:
            converted[key] = convert(value)
        except ValueError as error:
            noun = {int: "a whole number", bool: "true or false"}.get(wanted[key], "a number")
            raise UserError(f"{name}({key}) is '{value}'; it must be {noun}.") from error
    return converted


def _quoted(value: str) -> str:
    return f'"{value}"' if _NEEDS_QUOTES.search(value) else value


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _number(text: str) -> int | float:
    """Whole numbers as int, others as float."""
    return int(text) if text.isdecimal() else float(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"
