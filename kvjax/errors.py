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
