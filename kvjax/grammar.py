"""The language of policies: terms joined by `+`, read into a `Policy`.

SELECTION(budget=..., ...)          which tokens stay; at most one
CODEC(...)                          how keys and values are stored
key(CODEC,...)  value(CODEC,...)    or apart
CODEC(...,part=1/2)                 for the first of two equal parts of the layers; a term without part has the others
exact(sinks=P,window=W,round=U)     overrides the segment that the codec or the selection asks for, in part or whole
layers(uniform)  layers(pyramid,beta=20)  layers(512,256,...)
heads(uniform)  heads(adaptive,floor=0.2)
prompt(N)                           prompts of up to N tokens stay, on top of the budget; prompt(inside) counts them
protect(values=0.01)                that share of a head's budget is for the values of largest norm
edges(n)                            the first and last n layers stay uncompressed
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

from kvjax.codec import CODECS, Codec, ExactSizes
from kvjax.errors import UserError, check_between, check_choice, unknown
from kvjax.policy import FULL, HEADS, SCHEDULES, Heads, Layers, PinnedPrompt, Policy
from kvjax.selection import SELECTIONS, Selection
from kvjax.terms import Term, convert_arguments, read_term, split_list, split_outside

SETTINGS = ("exact", "edges", "layers", "heads", "prompt", "protect")
"""Terms that say how, beside those that say what."""

TERMS = ("full", "key", "value", *SETTINGS)
"""Words of the language beside the names of codecs and selections."""

Parts = dict[tuple[int, int] | None, Codec]
"""Part of the layers, (which, of how many), or None for those that no other term names -> codec."""

_convert = functools.partial(convert_arguments, hidden=("role", "layer", "inner"))


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
    text = " ".join(text.split())
    codecs: dict[str, Parts] = {"keys": {}, "values": {}}
    settings: dict[str, Any] = {}
    selection, words = None, []
    for word in split_outside(text, "+"):
        term = _read_term(word)
        words.append(str(term))
        name, positional, named = term
        if name in SETTINGS:
            if name in settings:
                raise UserError(f"The policy '{text}' has {name} twice; give it once.")
            settings[name] = _READERS[name](positional, named)
        elif name in SELECTIONS.names():
            if selection is not None:
                raise UserError(f"The policy '{text}' has two selections; give one.")
            selection = _selection_of(name, positional, named)
        else:
            part = _part_of(named)
            for role, codec in _codecs_of(name, positional, named).items():
                if part in codecs[role]:
                    raise UserError(f"The policy '{text}' has two codecs for {role}; give one, or key(...)+value(...).")
                codecs[role][part] = codec
    if not any(codecs.values()) and selection is None:
        raise UserError(
            f"The policy '{text}' names no codec and no selection; begin it with one, or with full: "
            f"'full+{text.strip()}'."
        )
    parts = {role: _in_order(given, text) for role, given in codecs.items() if given}
    policy = _assemble(parts, selection, settings, text="+".join(words))
    _check_round(policy)
    policy.check()
    return policy


def _assemble(
    parts: dict[str, tuple[Codec, ...]], selection: Selection | None, settings: dict[str, Any], *, text: str
) -> Policy:
    """The policy, with what the terms left open."""
    codecs = {role: given[0] for role, given in parts.items()}
    plain = [name for name, codec in codecs.items() if codec == FULL[name]]
    if selection is not None:
        exact = ExactSizes()
    else:
        exact = Policy().exact if len(plain) == len(codecs) else next(iter(codecs.values())).exact
        needless = [name for name in ("layers", "heads", "prompt", "protect") if name in settings]
        if needless:
            raise UserError(
                f"The policy '{text}' has {needless[0]}(...) and no selection, so nothing is ever evicted: add one, "
                f"e.g. snapkv(budget=1024), or leave it out."
            )
    layers = settings.get("layers") or Layers(kind=selection.schedule if selection else "uniform")
    heads = settings.get("heads") or Heads(kind=selection.heads if selection else "uniform")
    return Policy(
        **{**FULL, **codecs},
        parts=tuple(given if len(given) > 1 else () for given in (parts.get(role, ()) for role in FULL)),
        exact=dataclasses.replace(exact, **settings.get("exact", {})),
        edges=settings.get("edges", 0),
        selection=selection,
        layers=layers,
        heads=heads,
        prompt=settings.get("prompt"),
        outliers=settings.get("protect", 0.0),
        text=text,
    )


def split_policies(text: str) -> list[str]:
    """Splits a list of policies at commas and semicolons outside parentheses and quotes."""
    return split_list(text)


def _read_term(word: str) -> Term:
    """One term of a policy; its name is a known one."""
    term = read_term(word, kind="term of a policy", joint="+")
    known = [*TERMS, *CODECS.names(), *SELECTIONS.names()]
    if term.name not in known:
        raise unknown("policy term", term.name, known)
    return term


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
        return {role: FULL[role] for role in roles}
    make = CODECS.get(name)
    arguments = _convert(name, make, named)
    return {role: make(role, **arguments) for role in roles}


def _part_of(named: dict[str, str]) -> tuple[int, int] | None:
    """Takes `part=i/n` out of a term's arguments: which part, from 0, and of how many; None where it is not there."""
    if "part" not in named:
        return None
    text = named.pop("part")
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"part is '{text}'; it says which of how many equal parts of the layers, e.g. part=1/2.")
    return int(match[1]) - 1, int(match[2])


def _in_order(given: Parts, text: str) -> tuple[Codec, ...]:
    """The codecs of all parts of the layers, first to last; one where there are no parts."""
    rest = given.get(None)
    counts = sorted({part[1] for part in given if part})
    if not counts:
        return (rest,)
    if len(counts) > 1:
        raise UserError(f"The policy '{text}' has parts by {counts[0]} and by {counts[1]}; use one number for both.")
    found = tuple(given.get((index, counts[0]), rest) for index in range(counts[0]))
    if None in found:
        missing = f"{found.index(None) + 1}/{counts[0]}"
        raise UserError(f"The policy '{text}' leaves part {missing} of the layers open; add a codec without part.")
    return found


def _exact(positional: list[str], named: dict[str, str]) -> dict[str, int]:
    """Arguments of `exact`."""
    if positional or not named:
        raise UserError("exact takes sinks, window and round by name, e.g. exact(sinks=4,window=128).")
    sizes = _convert("exact", ExactSizes, named)
    for key, value in sizes.items():
        check_between(f"exact({key})", value, 1 if key == "round" else 0, 1 << 20)
    return sizes


def _selection_of(name: str, positional: list[str], named: dict[str, str]) -> Selection:
    """The selection that a term names."""
    if positional:
        raise UserError(f"{name} takes arguments by name, e.g. {name}(budget=1024); '{positional[0]}' has none.")
    make = SELECTIONS.get(name)
    selection = make(**_convert(name, make, named))
    budget = selection.budget
    if not (0 < budget <= 1.0 if isinstance(budget, float) else 1 <= budget <= 1 << 30):
        raise UserError(
            f"{name}(budget) is {budget}; it must be a whole number of tokens, e.g. 1024, or a share, above 0 to 1.0."
        )
    return selection


def _edges(positional: list[str], named: dict[str, str]) -> int:
    """The argument of `edges`."""
    values = positional + [value for key, value in named.items() if key == "layers"]
    if len(values) != 1 or len(named) + len(positional) != 1 or not values[0].isdecimal():
        raise UserError("edges takes one whole number, the layers at each end that stay uncompressed: edges(2).")
    return int(values[0])


def _layers(positional: list[str], named: dict[str, str]) -> Layers:
    """The arguments of `layers`."""
    if positional and all(value.isdecimal() for value in positional) and not named:
        return Layers(kind="given", budgets=tuple(map(int, positional)))
    if len(positional) != 1 or positional[0] == "given":
        raise UserError("layers takes uniform, pyramid or a budget for each layer, e.g. layers(512,256,256,128).")
    check_choice("layers(...)", positional[0], [kind for kind in SCHEDULES if kind != "given"])
    settings = _convert(*(("layers", _pyramid) if positional[0] == "pyramid" else ("layers(uniform)", _nothing)), named)
    check_between("layers(beta)", settings.get("beta", 20.0), 1.0, 1e6)
    return Layers(kind=positional[0], **settings)


def _heads(positional: list[str], named: dict[str, str]) -> Heads:
    """The arguments of `heads`."""
    if len(positional) != 1:
        raise UserError("heads takes uniform or adaptive, e.g. heads(adaptive,floor=0.2).")
    check_choice("heads(...)", positional[0], HEADS)
    settings = _convert(*(("heads", _adaptive) if positional[0] == "adaptive" else ("heads(uniform)", _nothing)), named)
    check_between("heads(floor)", settings.get("floor", 0.2), 0.0, 1.0)
    return Heads(kind=positional[0], **settings)


def _nothing() -> None:
    """Takes no arguments."""


def _pyramid(beta: float = 20.0) -> None:
    """The arguments of `layers(pyramid)`."""


def _adaptive(floor: float = 0.2) -> None:
    """The arguments of `heads(adaptive)`."""


def _prompt(positional: list[str], named: dict[str, str]) -> PinnedPrompt:
    """The argument of `prompt`."""
    if positional == ["inside"] and not named:
        return PinnedPrompt(inside=True)
    if len(positional) != 1 or named or not positional[0].isdecimal() or not int(positional[0]):
        raise UserError(
            "prompt takes the longest prompt that there is room for on top of the budget, prompt(2048), or "
            "prompt(inside), which counts it in the budget."
        )
    return PinnedPrompt(tokens=int(positional[0]))


def _protect(positional: list[str], named: dict[str, str]) -> float:
    """The argument of `protect`."""
    if positional or set(named) != {"values"}:
        raise UserError("protect takes the share of a budget for values of large norm: protect(values=0.01).")
    share = _convert("protect", _values, named)["values"]
    check_between("protect(values)", share, 0.0, 1.0)
    return share


def _values(values: float) -> None:
    """The argument of `protect`."""


_READERS: dict[str, Callable[[list[str], dict[str, str]], Any]] = {
    "exact": _exact,
    "edges": _edges,
    "layers": _layers,
    "heads": _heads,
    "prompt": _prompt,
    "protect": _protect,
}


def _check_round(policy: Policy) -> None:
    """A round holds whole bytes, whole groups and whole pages."""
    page = policy.selection.page if policy.selection else 0
    granule = math.lcm(*(codec.granule for codec in policy.all_codecs))
    if page and page % granule and (granule % page or page == 1):
        name = type(policy.selection).__name__.lower()
        raise UserError(
            f"{name}(page) is {page}; where {granule} tokens share scales it must be a multiple of that, or a divisor "
            "above 1."
        )
    unit = math.lcm(8, granule, page or 1)
    size = policy.exact.round
    if size % unit:
        near = max(round(size / unit), 1) * unit
        raise UserError(
            f"exact(round) is {size}; with this policy it must be a multiple of {unit}. The nearest is {near}."
        )
