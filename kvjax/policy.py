"""Policies: what a cache keeps, and how. A policy is static and hashable; people type it as a string.

    full                                              every token in the model's dtype
    int8                                              one codec for keys and values
    turboquant(bits=4)+exact(sinks=4,window=128)      with the tokens that stay exact
    key(turboquant,bits=4)+value(int4)+edges(2)       codecs apart; the first and last two layers uncompressed

Terms are joined by `+`. `exact(sinks=P,window=W,round=U)` overrides what the codec asks for, in part or whole.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

from kvjax.codec import CODECS, Codec, ExactSizes
from kvjax.errors import UserError, check_between, unknown

TERMS = ("full", "key", "value", "exact", "edges")
"""Words of the language beside the names of codecs."""

_FULL = {"keys": Codec(role="keys"), "values": Codec(role="values")}
_TERM = re.compile(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """How a cache keeps its tokens.

    Attributes:
      keys: codec of the keys in the body.
      values: codec of the values.
      exact: sizes of the segment that stays in the model's dtype.
      edges: first and last layers whose body stays in the model's dtype.
      text: the policy as people type it.
    """

    keys: Codec = _FULL["keys"]
    values: Codec = _FULL["values"]
    exact: ExactSizes = ExactSizes(sinks=0, window=0)
    edges: int = 0
    text: str = "full"

    def codecs(self, layer: int, num_layers: int) -> tuple[Codec, Codec]:
        """Codecs of keys and values for a layer.

        Raises:
          UserError: the edges take in all layers.
        """
        if self.edges and 2 * self.edges >= num_layers:
            most = (num_layers - 1) // 2
            raise UserError(
                f"edges({self.edges}) leaves none of the model's {num_layers} layers to compress; it must be at most "
                f"{most}."
            )
        inner = self.edges <= layer < num_layers - self.edges
        return (self.keys, self.values) if inner else (_FULL["keys"], _FULL["values"])

    def body_slots(self, max_tokens: int) -> int:
        """Slots of the body when a row has seen `max_tokens`: what the exact segment cannot hold, in whole rounds."""
        beyond = max(max_tokens - self.exact.sinks - self.exact.window - self.exact.round, 0)
        return math.ceil(beyond / self.exact.round) * self.exact.round

    def __str__(self) -> str:
        return self.text


def parse_policy(text: Any) -> Policy:
    """Reads a policy from the string that people type.

    Args:
      text: e.g. "kivi(bits=2)+exact(window=64)"; a `Policy` is returned as it is.

    Raises:
      UserError: a term or an argument is unknown, or a value is out of range, with the nearest that would do.
    """
    if isinstance(text, Policy):
        return text
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"A policy is a string such as 'full' or 'int8', not {text!r}.")
    codecs: dict[str, Codec] = {}
    settings: dict[str, dict[str, Any]] = {}
    words = []
    for word in _split(text):
        name, positional, named = _read_term(word)
        words.append(_write_term(name, positional, named))
        if name in ("exact", "edges"):
            if name in settings:
                raise UserError(f"The policy '{text}' has {name} twice; give it once.")
            settings[name] = _edges(positional, named) if name == "edges" else _exact(positional, named)
            continue
        for role, codec in _codecs_of(name, positional, named).items():
            if role in codecs:
                raise UserError(f"The policy '{text}' has two codecs for {role}; give one, or key(...)+value(...).")
            codecs[role] = codec
    if not codecs:
        raise UserError(f"The policy '{text}' names no codec; begin it with one, or with full: 'full+{text.strip()}'.")
    plain = [name for name, codec in codecs.items() if codec == _FULL[name]]
    exact = Policy().exact if len(plain) == len(codecs) else next(iter(codecs.values())).exact
    policy = Policy(
        **{**_FULL, **codecs},
        exact=dataclasses.replace(exact, **settings.get("exact", {})),
        **settings.get("edges", {}),
        text="+".join(words),
    )
    _check_round(policy)
    return policy


def split_policies(text: str) -> list[str]:
    """Splits a list of policies at commas and semicolons outside parentheses."""
    parts = re.split(r"[,;](?![^()]*\))", text)
    return [part.strip() for part in parts if part.strip()]


def _split(text: str) -> list[str]:
    """The terms of a policy."""
    return re.split(r"\+(?![^()]*\))", text)


def _read_term(word: str) -> tuple[str, list[str], dict[str, str]]:
    """Name, positional and named arguments of a term."""
    match = _TERM.match(word)
    if not match:
        raise UserError(
            f"'{word.strip()}' is no term of a policy: write NAME or NAME(argument=value, ...), joined by '+'."
        )
    positional, named = [], {}
    for argument in filter(None, (part.strip() for part in (match.group(2) or "").split(","))):
        if "=" in argument:
            key, value = (half.strip() for half in argument.split("=", 1))
            if key in named:
                raise UserError(f"'{word.strip()}' gives {key} twice.")
            named[key] = value
        else:
            positional.append(argument)
    name = match.group(1)
    if name not in TERMS and name not in CODECS.names():
        raise unknown("policy term", name, [*TERMS, *CODECS.names()])
    return name, positional, named


def _write_term(name: str, positional: list[str], named: dict[str, str]) -> str:
    """A term in its plain spelling."""
    arguments = [*positional, *(f"{key}={value}" for key, value in named.items())]
    return f"{name}({','.join(arguments)})" if arguments else name


def _codecs_of(name: str, positional: list[str], named: dict[str, str]) -> dict[str, Codec]:
    """The codecs that a term names, by role."""
    roles = {"key": ("keys",), "value": ("values",)}.get(name, ("keys", "values"))
    if name in ("key", "value"):
        if not positional:
            raise UserError(f"{name}(...) begins with a codec, e.g. {name}(int8).")
        name = positional.pop(0)
    if positional:
        raise UserError(f"{name} takes arguments by name, e.g. {name}(bits=4); '{positional[0]}' has none.")
    if name == "full":
        if named:
            raise UserError(f"full takes no arguments; '{next(iter(named))}' came.")
        return {role: _FULL[role] for role in roles}
    make = CODECS.get(name)
    arguments = _convert(name, make, named)
    return {role: make(role, **arguments) for role in roles}


def _convert(name: str, function: Callable, named: dict[str, str]) -> dict[str, Any]:
    """Arguments as the types that a function's signature asks for."""
    wanted = {key: parameter for key, parameter in inspect.signature(function).parameters.items() if key != "role"}
    converted = {}
    for key, value in named.items():
        if key not in wanted:
            raise unknown(f"argument of {name}", key, wanted)
        kind = wanted[key].annotation
        try:
            converted[key] = kind(value)
        except ValueError as error:
            noun = {int: "a whole number", float: "a number"}[kind]
            raise UserError(f"{name}({key}) is '{value}'; it must be {noun}.") from error
    return converted


def _exact(positional: list[str], named: dict[str, str]) -> dict[str, int]:
    """Arguments of `exact`."""
    if positional or not named:
        raise UserError("exact takes sinks, window and round by name, e.g. exact(sinks=4,window=128).")
    sizes = _convert("exact", ExactSizes, named)
    for key, value in sizes.items():
        check_between(f"exact({key})", value, 1 if key == "round" else 0, 1 << 20)
    return sizes


def _edges(positional: list[str], named: dict[str, str]) -> dict[str, int]:
    """The argument of `edges`."""
    values = positional + [value for key, value in named.items() if key == "layers"]
    if len(values) != 1 or len(named) + len(positional) != 1 or not values[0].isdecimal():
        raise UserError("edges takes one whole number, the layers at each end that stay uncompressed: edges(2).")
    return {"edges": int(values[0])}


def _check_round(policy: Policy) -> None:
    """A round holds whole bytes and whole groups."""
    unit = math.lcm(8, policy.keys.granule, policy.values.granule)
    size = policy.exact.round
    if size % unit:
        near = max(round(size / unit), 1) * unit
        raise UserError(
            f"exact(round) is {size}; with this codec it must be a multiple of {unit}. The nearest is {near}."
        )
