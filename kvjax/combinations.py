"""Each selection with each codec, from one string: what can be run, and why the rest cannot.

    SELECTIONS(budget=128)                  every selection, with these arguments
    CODECS+exact(window=64)                 every codec
    SELECTIONS(budget=128)+CODECS           each with each
    SELECTIONS(budget=128)+key(CODECS)      each codec for the keys alone

A policy that a person typed is right or ends the run. Of a combination nobody claims that it exists: what is refused is
named, with the reason, beside what ran.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from kvjax.codec import CODECS
from kvjax.errors import UserError
from kvjax.grammar import parse_policy, split_policies
from kvjax.policy import Policy
from kvjax.selection import SELECTIONS

_WORDS = {"SELECTIONS": SELECTIONS, "CODECS": CODECS}
"""Words that stand for every name, in capitals: no policy has any."""


def expand(text: str) -> list[str]:
    """The policies that a string stands for, as strings; the string itself where it has none of the words."""
    for word, registry in _WORDS.items():
        whole = re.compile(rf"(?<![\w./-]){word}(?![\w./-])")  # not a part of a file's name
        if whole.search(text):
            return [one for name in registry.names() for one in expand(whole.sub(name, text))]
    return [text]


class Combinations:
    """Policies to be run, and combinations that cannot be.

    Args:
      text: policies, separated by semicolons; see the module's text.

    Attributes:
      policies: each once, in the order in which they were asked for.
      refused: combination -> the reason.

    Raises:
      UserError: a policy without the words is wrong, or every combination of a string with them is.
    """

    def __init__(self, text: str):
        self.policies: list[Policy] = []
        self.refused: dict[str, str] = {}
        self._typed: set[str] = set()
        found: dict[str, Policy] = {}
        for typed in split_policies(text):
            names = expand(typed)
            if names == [typed]:
                policy = parse_policy(typed)
                self._typed.add(str(policy))
                found[str(policy)] = policy
            else:
                found |= {str(policy): policy for policy in self._read(names)}
        self.policies = list(found.values())

    def _read(self, names: Iterable[str]) -> list[Policy]:
        """The policies among combinations."""
        read, errors = [], {}
        for name in names:
            try:
                read.append(parse_policy(name))
            except UserError as error:
                errors[name] = error
        if not read:
            raise next(iter(errors.values()))
        self.refused |= {name: str(error) for name, error in errors.items()}
        return read

    def check(self, check: Callable[[Policy], Any]) -> None:
        """Takes out the combinations that a check refuses.

        Args:
          check: raises `UserError` for a policy that cannot be run, e.g. with this model.

        Raises:
          UserError: it refuses a policy that is no combination.
        """
        kept = []
        for policy in self.policies:
            try:
                check(policy)
            except UserError as error:
                if str(policy) in self._typed:
                    raise
                self.refused[str(policy)] = str(error)
            else:
                kept.append(policy)
        self.policies = kept
