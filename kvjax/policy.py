"""Policies: what a cache keeps, and how. A policy is static and hashable; people type it as a string."""

import dataclasses
from typing import Any

from kvjax.errors import UserError, unknown

POLICIES = ("full",)


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a cache keeps its tokens.

    Attributes:
      name: "full" keeps every token, exact, in the model's dtype.
    """

    name: str = "full"

    def exact_slots(self, max_tokens: int) -> int:
        """Slots of the exact segment of each layer; `full` has no body, so one for each token."""
        return max_tokens

    def __str__(self) -> str:
        return self.name


def parse_policy(text: Any) -> Policy:
    """Reads a policy from the string that people type.

    Args:
      text: e.g. "full"; a `Policy` is returned as it is.

    Raises:
      UserError: the policy is unknown, with the nearest known one.
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str):
        raise UserError(f"A policy is a string such as 'full', not {type(text).__name__} {text!r}.")
    name = text.strip()
    if name not in POLICIES:
        raise unknown("policy", text, POLICIES)
    return Policy(name=name)
