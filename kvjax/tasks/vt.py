"""Variable tracking in words: which variables come to hold a number (RULER's vt, arXiv 2404.06654, section 3).

    ... Let QXWPA be 48213. ... Let MKTOE be QXWPA. ...        Which variables have the value 48213?

A chain of assignments lies spread over the text, in order; further chains begin with other numbers. RULER puts a solved
problem before the text, and ends the prompt with the beginning of an answer; we do neither. `hops` and `variables` ask
the like in symbols.
"""

import dataclasses

import numpy as np

from kvjax.errors import check_between
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import count_prompt, filler_sentences, longest_prompt, prompt_of, share_found, weave

_INTRO = (
    "The text below sets variables, each to a number or to what another variable holds. Keep track of them: you will "
    "be asked which variables have a certain value.\n\n"
)
_LETTERS = np.asarray(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_NAME_LETTERS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vt(Task):
    """Asks for all variables of a chain.

    Attributes:
      tokens: of context and question together, chat template included; sentences fill what is left, and the last one
        that does not fit is left out.
      new_tokens: most tokens of an answer; models that think first want more.
      chains: numbers that are handed on, 1 to 64; one of them is asked for.
      hops: how often each is handed on, 1 to 64; a chain has one variable more.
    """

    tokens: int = 4096
    new_tokens: int = 64
    chains: int = 1
    hops: int = 4

    def __post_init__(self):
        check_between("vt(chains)", self.chains, 1, 64)
        check_between("vt(hops)", self.hops, 1, 64)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        length = self.hops + 1
        names = _draw_variables(rng, self.chains * length)
        values = 10_000 + rng.choice(90_000, self.chains, False)
        chains = [names[start : start + length] for start in range(0, len(names), length)]
        needles = [
            f"Let {name} be {before}. "
            for chain, value in zip(chains, values, strict=True)
            for before, name in zip([value, *chain[:-1]], chain, strict=True)
        ]
        depths = np.sort(rng.random((self.chains, length)), axis=1).ravel().tolist()
        pool = filler_sentences(rng, material, self.tokens)
        question = (
            f"Which variables have the value {values[0]}, directly or through others? There are {length} of them. "
            "Answer with their names."
        )

        def build(pieces: int) -> tuple[str, str]:
            text = weave(pool[:pieces], needles, depths)
            return prompt_of(material, f"{_INTRO}{text.strip()}\n\n", question)

        _, prompt = longest_prompt(self, material, build, len(pool))
        return Example(
            context=prompt[0],
            question=prompt[1],
            answer=", ".join(chains[0]),
            facts={"hops": self.hops, "tokens": count_prompt(material, prompt)},
        )

    def score(self, output: str, example: Example) -> float:
        """Share of the right variables that are named in the output."""
        return share_found(output, example.answer.split(", "))


def _draw_variables(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of five letters."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(_LETTERS[rng.integers(len(_LETTERS), size=_NAME_LETTERS)])] = None
    return list(names)


TASKS.register("vt", Vt)
