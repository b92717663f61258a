"""Errors that a person can act on: what was wrong, what was expected, the way out, in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the caller's or a fault of a file; programs print it as one line and exit with code 2."""


def unknown(kind: str, name: object, known: Iterable[str], *, advice: str = "") -> UserError:
    """Builds the error for a name that is not among the known ones, the nearest first.

    Args:
      kind: what the name should name, e.g. "policy".
      name: what came.
      known: the names that would have been right.
      advice: one more sentence, the way out when none of the known names is what was meant.

    Returns:
      The error, to be raised by the caller.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    listed = ", ".join(names) if names else "none"
    return UserError(f"Unknown {kind} '{name}'.{hint} Known: {listed}.{' ' + advice if advice else ''}")


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raises `UserError` unless a value is one of the allowed ones; names the nearest.

    Args:
      name: of the argument, e.g. "turboquant(bits)".
      value: what came.
      allowed: what may come, all numbers or all strings.
    """
    choices = list(allowed)
    if value in choices and not isinstance(value, bool):
        return
    listed = ", ".join(map(str, choices))
    if all(isinstance(number, (int, float)) for number in [value, *choices]):
        near = min(choices, key=lambda number: abs(number - value))
    else:
        near = next(iter(difflib.get_close_matches(str(value), list(map(str, choices)), n=1)), choices[0])
    raise UserError(f"{name} is {value}; it must be one of {listed}. The nearest is {near}.")


def check_between(
    name: str, value: int | float, low: int | float, high: int | float, *, open_above: bool = False
) -> None:
    """Raises `UserError` unless low <= value <= high (< high with `open_above`)."""
    inside = low <= value < high if open_above else low <= value <= high
    if not inside:
        bound = "below" if open_above else "at most"
        near = low if value < low else high
        hint = "" if open_above and near == high else f" The nearest is {near}."
        raise UserError(f"{name} is {value}; it must be at least {low} and {bound} {high}.{hint}")
