"""Candidates of a search: what may be chosen, and the policies that choices spell.

Budgets are shares, so that a policy takes about as many bytes a token in caches of any length. Keys never have fewer
bits than values, since errors of keys cost more (attention's weights are exponential in them).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvjax.errors import UserError
from kvjax.terms import Term, read_term

Choices = Mapping[str, Any]
"""Name of a choice -> what was chosen."""

LAYERS = ("even", "first", "last")
"""Which half of the layers has one more step of bits than the other."""

_SINKS = 4
_PLAIN = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What a search chooses from.

    Attributes:
      selections: terms without a budget, e.g. "snapkv(queries=16)".
      codecs: terms from most bits to fewest, "full" first.
      windows: tokens that stay exact at least; as many move to the body at once.
      edges: layers at each end that stay uncompressed.
      shares: of the limit, how much a selection's budget may take.

    Raises:
      UserError: a term is malformed, or has a budget, or there is nothing to choose from.
    """

    selections: tuple[str, ...]
    codecs: tuple[str, ...]
    windows: tuple[int, ...] = (16, 32, 64, 128)
    edges: tuple[int, ...] = (0, 1)
    shares: tuple[float, ...] = (1.0, 0.75)

    def __post_init__(self):
        for text in self.selections:
            if "budget" in _read(text).named:
                raise UserError(f"The selection '{text}' has a budget, which is what is searched for: leave it out.")
        for text in self.codecs:
            _read(text)
        if self.codecs[:1] != (_PLAIN,):
            object.__setattr__(self, "codecs", (_PLAIN, *self.codecs))
        if not self.selections and len(self.codecs) == 1:
            raise UserError("There is nothing to choose from: give --selections or --codecs.")

    def axes(self) -> dict[str, tuple]:
        """Each choice and its values."""
        return {
            "selection": ("", *self.selections),
            "keys": self.codecs,
            "values": tuple(range(min(3, len(self.codecs)))),  # steps down from the keys' codec
            "layers": LAYERS,
            "edges": self.edges,
            "window": self.windows,
            "budgets": ("uniform", "pyramid"),
            "share": self.shares,
        }

    def spell(self, choices: Choices, *, budget: float | None = None) -> str:
        """The policy of some choices.

        Args:
          choices: one of each.
          budget: share of the tokens that stay, where a selection is chosen.
        """
        words = self._codec_words(choices)
        if choices["selection"]:
            term = _read(choices["selection"])
            words = [word for word in words if word != _PLAIN]
            words.insert(
                0, str(term._replace(named={"budget": "..." if budget is None else repr(budget), **term.named}))
            )
        if words == [_PLAIN]:
            return _PLAIN
        window = choices["window"]
        words.append(f"exact(sinks={_SINKS},window={window},round={window})")
        if choices["edges"]:
            words.append(f"edges({choices['edges']})")
        if choices["selection"] and choices["budgets"] != "uniform":
            words.append(f"layers({choices['budgets']})")
        return "+".join(words)

    def _codec_words(self, choices: Choices) -> list[str]:
        """The codecs' terms: of all layers, and one step up of half of them."""
        keys = self.codecs.index(choices["keys"])
        steps = keys, min(keys + choices["values"], len(self.codecs) - 1)
        words = _both(*(self.codecs[step] for step in steps))
        if choices["layers"] == "even" or not any(steps):
            return words
        raised = [self.codecs[max(step - 1, 0)] for step in steps]
        return words + _both(*raised, part="1/2" if choices["layers"] == "first" else "2/2")

    def kind(self, choices: Choices) -> str:
        """What choices are: one "codec" for all, or one "selection", the same for all layers; or "mixed"."""
        same = not choices["values"] or choices["keys"] == self.codecs[-1]
        if choices["edges"] or not same or (choices["layers"] != "even" and choices["keys"] != _PLAIN):
            return "mixed"
        if not choices["selection"]:
            return "codec"
        return "selection" if choices["keys"] == _PLAIN and choices["budgets"] == "uniform" else "mixed"

    def starts(self) -> list[dict[str, Any]]:
        """Where a search begins: each codec alone, and each selection alone."""
        plain = {"selection": "", "keys": _PLAIN, "values": 0, "layers": "even", "edges": 0, "budgets": "uniform"}
        plain |= {"window": self.windows[0], "share": self.shares[0]}
        codecs = [{**plain, "keys": codec} for codec in self.codecs[1:]]
        return codecs + [{**plain, "selection": selection} for selection in self.selections]

    def near(self, choices: Choices) -> list[dict[str, Any]]:
        """What is tried next where choices that are the same everywhere did well.

        A codec's half-way houses to the one with more bits: in keys, or in either half of the layers. A selection with
        each codec, whose budget is then larger. And either with other windows.
        """
        found = [{**choices, "keys": codec} for codec in self.codecs[1:]] if choices["selection"] else []
        index = self.codecs.index(choices["keys"])
        if index > 1:
            found.append({**choices, "keys": self.codecs[index - 1], "values": 1})
            found += [{**choices, "layers": layers} for layers in LAYERS[1:]]
        return found + [{**choices, "window": window} for window in self.windows if window != choices["window"]]


def _read(text: str) -> Term:
    return read_term(text, kind="term of a policy", joint="+")


def _both(keys: str, values: str, *, part: str | None = None) -> list[str]:
    """Terms for codecs of keys and of values."""
    more = {} if part is None else {"part": part}
    if keys == values:
        term = _read(keys)
        return [str(term._replace(named={**term.named, **more}))]
    terms = {"key": _read(keys), "value": _read(values)}
    return [str(Term(role, [term.name, *term.positional], {**term.named, **more})) for role, term in terms.items()]
