"""Short names of policies in a picture: what they have in common is said once."""

import dataclasses
import re
from collections.abc import Sequence

from kvjax.grammar import SETTINGS
from kvjax.selection import SELECTIONS


@dataclasses.dataclass(frozen=True)
class Names:
    """What the policies of a picture are called.

    Attributes:
      common: terms that all policies but `full` have, as text; empty for none.
      short: policy -> its text without them.
      families: policy -> its methods without numbers, "triattention + int4"; budgets and bits of one family are a line.
      methods: family -> the method that decides its colour.
    """

    common: str
    short: dict[str, str]
    families: dict[str, str]
    methods: dict[str, str]


def names_of(policies: Sequence[str]) -> Names:
    """Names for policies, in their order."""
    unique = list(dict.fromkeys(policies))
    lists = {policy: _terms(policy) for policy in unique}
    lossy = [set(terms) for policy, terms in lists.items() if policy != "full"]
    shared = set.intersection(*lossy) if lossy else set()
    common = [term for term in (lists[unique[-1]] if unique else []) if term in shared and _name(term) in SETTINGS]
    rest = {policy: [term for term in terms if term not in common] for policy, terms in lists.items()}
    families = {policy: _family(terms) for policy, terms in rest.items()}
    methods: dict[str, str] = {}
    for policy, family in families.items():
        methods.setdefault(family, _method(lists[policy]))
    return Names("+".join(common), {policy: "+".join(terms) for policy, terms in rest.items()}, families, methods)


def _terms(policy: str) -> list[str]:
    return [term.strip() for term in re.split(r"\+(?![^()]*\))", policy)]


def _name(term: str) -> str:
    return term.split("(")[0]


def _codecs(terms: Sequence[str]) -> str:
    """Codecs of keys and of values without numbers, several of parts of the layers joined; empty for none."""
    roles: dict[str, list[str]] = {"key": [], "value": []}
    for term in terms:
        roles.get(_name(term), []).append(re.split(r"[(),]", term)[1] if "(" in term else "")
    if not any(roles.values()):
        return ""
    return "/".join("+".join(dict.fromkeys(roles[role])) or "full" for role in ("key", "value"))


def _family(terms: Sequence[str]) -> str:
    plain = [term for term in terms if _name(term) not in (*SETTINGS, "key", "value")]
    more = [term for term in terms if _name(term) in SETTINGS and _name(term) != "exact"]
    return " + ".join([*map(_name, plain), *filter(None, [_codecs(terms)]), *more])


def _method(terms: Sequence[str]) -> str:
    """The selection, or else the first codec."""
    plain = [_name(term) for term in terms if _name(term) not in (*SETTINGS, "key", "value")]
    chosen = [name for name in plain if name == "oracle" or name in SELECTIONS.names()]
    return next(iter([*chosen, *plain]), re.split("[/+]", _codecs(terms))[0])


def fold(text: str, width: int) -> str:
    """Breaks a name at its joints so that no line is longer than `width`, where that can be."""
    lines = [""]
    for piece in re.split(r"(?<=,)|(?=[(+])", text):
        if lines[-1] and len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
