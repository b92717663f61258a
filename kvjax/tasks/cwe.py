"""Common words: the words that come most often in a long list (RULER's cwe, arXiv 2404.06654, section 3).

1. old-lamp 2. rusty-violin 3. old-lamp ...        Which 10 words come most often in the list?

Words are our names of things. RULER puts a solved problem before the list, and ends the prompt with the beginning of
an answer; we do neither.
"""

import dataclasses

import numpy as np

from kvjax.errors import check_between
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import count_prompt, draw_names, longest_prompt, prompt_of, share_found

_INTRO = (
    "Below is a numbered list of words. Some of them come often in it, the others seldom. Keep count: you will be "
    "asked for the words that come most often.\n\n"
)
_ENTRY_TOKENS = 5  # of any tokenizer at least: number, point, word of two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cwe(Task):
    """Asks for the most common words of a list.

    Attributes:
      tokens: of context and question together, chat template included; uncommon words fill what is left.
      new_tokens: most tokens of an answer; models that think first want more.
      num_cw: common words, 1 to 64.
      freq_cw: how often each of them comes.
      freq_ucw: how often each uncommon word comes, below `freq_cw`.
    """

    tokens: int = 4096
    new_tokens: int = 128
    num_cw: int = 10
    freq_cw: int = 30
    freq_ucw: int = 3

    def __post_init__(self):
        check_between("cwe(num_cw)", self.num_cw, 1, 64)
        check_between("cwe(freq_cw)", self.freq_cw, 2, 1 << 16)
        check_between("cwe(freq_ucw)", self.freq_ucw, 1, self.freq_cw - 1)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        most = self.tokens // (_ENTRY_TOKENS * self.freq_ucw)
        names = draw_names(rng, self.num_cw + most)
        common, uncommon = names[: self.num_cw], names[self.num_cw :]
        places = rng.random(self.num_cw * self.freq_cw + most * self.freq_ucw)
        question = f"Which {self.num_cw} words come most often in the list? Answer with these words."

        def build(pieces: int) -> tuple[str, str]:
            words = common * self.freq_cw + uncommon[:pieces] * self.freq_ucw
            order = np.argsort(places[: len(words)])
            listed = " ".join(f"{number}. {words[one]}" for number, one in enumerate(order, start=1))
            return prompt_of(material, f"{_INTRO}{listed}\n\n", question)

        pieces, prompt = longest_prompt(self, material, build, most)
        return Example(
            context=prompt[0],
            question=prompt[1],
            answer=", ".join(common),
            facts={"uncommon": pieces, "tokens": count_prompt(material, prompt)},
        )

    def score(self, output: str, example: Example) -> float:
        """Share of the common words that are in the output."""
        return share_found(output, example.answer.split(", "))


TASKS.register("cwe", Cwe)
