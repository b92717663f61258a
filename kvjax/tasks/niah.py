"""Needles in words: numbers that are stated once somewhere in a long text (RULER's niah, arXiv 2404.06654, section 3).

    ... The rusty-violin has the code 4829173. ...        Which code does the text give for the rusty-violin?

RULER's variants by argument: single `niah`, multi-key `keys=4`, multi-value `values=4`, multi-query `keys=4,queries=4`;
with `haystack=needles`, all of the text is needles. Wordings and names are ours; where RULER ends the prompt
with the beginning of an answer, a model with a chat template is only asked. `needle` asks the like in symbols.
"""

import dataclasses

import numpy as np

from kvjax.errors import check_between, check_choice
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import count_prompt, draw_names, filler_sentences, longest_prompt, prompt_of, share_found, weave

_INTRO = "The text below states codes of things. Read it with care: some of the codes will be asked for.\n\n"
_HAYSTACKS = ("sentences", "repeat", "needles")
_REPEATED = ("It rains. ", "The road is wet. ", "Cars go by. ", "A dog waits at the door. ")
_NEEDLE_TOKENS = 8  # of any tokenizer at least


@dataclasses.dataclass(frozen=True, kw_only=True)
class Niah(Task):
    """Asks for numbers in a long text.

    Attributes:
      tokens: of context and question together, chat template included; the haystack fills what is left, and the last
        sentence that does not fit is left out.
      new_tokens: most tokens of an answer; models that think first want more.
      depth: where the first needle that is asked for lies among the sentences, 0 to 1; below 0 for anywhere.
      keys: things that have codes, 1 to 64; those that are not asked for are distractors.
      values: codes of each, 1 to 16.
      queries: things that are asked for, at most `keys`.
      haystack: "sentences" that differ, a group of sentences that "repeat", or more "needles".
    """

    tokens: int = 4096
    new_tokens: int = 128
    depth: float = -1.0
    keys: int = 1
    values: int = 1
    queries: int = 1
    haystack: str = "sentences"

    def __post_init__(self):
        check_between("niah(depth)", self.depth, -1.0, 1.0)
        check_between("niah(keys)", self.keys, 1, 64)
        check_between("niah(values)", self.values, 1, 16)
        check_between("niah(queries)", self.queries, 1, self.keys)
        check_choice("niah(haystack)", self.haystack, _HAYSTACKS)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        further = self.tokens // _NEEDLE_TOKENS if self.haystack == "needles" else 0
        names = draw_names(rng, self.keys + further)
        codes = [str(code) for code in 1_000_000 + rng.choice(9_000_000, self.keys * self.values + further, False)]
        owners = [name for name in names[: self.keys] for _ in range(self.values)]
        needles = [_needle(name, code) for name, code in zip(owners, codes, strict=False)]
        depths = rng.random(len(needles)).tolist()
        if self.depth >= 0:
            depths[0] = self.depth
        pool = [_needle(*pair) for pair in zip(names[self.keys :], codes[len(needles) :], strict=True)]
        pool = pool or self._sentences(rng, material)
        question = _question(names[: self.queries], one=self.values == 1)

        def build(pieces: int) -> tuple[str, str]:
            text = weave(pool[:pieces], needles, depths)
            return prompt_of(material, f"{_INTRO}{text.strip()}\n\n", question)

        _, prompt = longest_prompt(self, material, build, len(pool))
        return Example(
            context=prompt[0],
            question=prompt[1],
            answer=", ".join(codes[: self.queries * self.values]),
            facts={"depth": depths[0], "tokens": count_prompt(material, prompt)},
        )

    def _sentences(self, rng: np.random.Generator, material: Material) -> list[str]:
        if self.haystack == "repeat":
            return [*_REPEATED] * (self.tokens // len(_REPEATED))
        return filler_sentences(rng, material, self.tokens)

    def score(self, output: str, example: Example) -> float:
        """Share of the right numbers that are in the output."""
        return share_found(output, example.answer.split(", "))


def _needle(name: str, code: str) -> str:
    return f"The {name} has the code {code}. "


def _question(names: list[str], *, one: bool) -> str:
    things = [f"the {name}" for name in names]
    listed = " and ".join(filter(None, [", ".join(things[:-1]), things[-1]]))
    if one and len(names) == 1:
        return f"Which code does the text give for {listed}? Answer with the number."
    return f"Which codes does the text give for {listed}? Answer with all of these numbers."


TASKS.register("niah", Niah)
