"""Perplexity: text that is given, and how likely the model finds it; nothing is generated.

[ tokens: the prompt | scored: every token sees the cache as decoding would ]
"""

import dataclasses
import functools
from typing import ClassVar

import numpy as np

from kvjax.corpus import read_documents
from kvjax.errors import UserError, check_between
from kvjax.folder import find_file
from kvjax.task import TASKS, Example, Material, Task

_TEXTS = "tinyshakespeare/input.txt", "moby-dick/2701.txt", "gsm8k/train.jsonl"
_DEFAULT = ":".join(f"../shared/data/{name}" for name in _TEXTS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ppl(Task):
    """Scores pieces of text.

    Attributes:
      tokens: of the prompt.
      scored: tokens behind it that are scored.
      file: texts, separated by colons; pieces are spread evenly over all of them.
      held_out: share of each file, its end, that is used; the model in the tree has read all but the last 0.02 of the
        default's.
    """

    forced: ClassVar[bool] = True

    tokens: int = 512
    scored: int = 500
    file: str = _DEFAULT
    held_out: float = 0.02

    def __post_init__(self):
        check_between("ppl(tokens)", self.tokens, 1, 1 << 30)
        check_between("ppl(scored)", self.scored, 1, 1 << 30)
        check_between("ppl(held_out)", self.held_out, 1e-6, 1.0)

    @property
    def new_tokens(self) -> int:
        """Tokens scored."""
        return self.scored

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """A piece of text from a place that `rng` draws, long enough for prompt and scored tokens together."""
        text, needed = _held_out_text(self.file, self.held_out), self.tokens + self.scored
        size = needed
        while size <= len(text):
            start = int(rng.integers(0, len(text) - size + 1))
            piece = text[start : start + size]
            if material.count(piece) >= needed:
                return Example(context=piece, question="", answer="")
            size = min(2 * size, len(text)) if size < len(text) else size + 1
        raise UserError(
            f"The texts of {self.name} hold too little for {needed} tokens: give more with file or held_out, or lower "
            "tokens or scored."
        )

    def score(self, output: str, example: Example) -> float:
        """Nothing is generated."""
        raise NotImplementedError("ppl is scored by likelihood alone")


@functools.lru_cache(maxsize=4)
def _held_out_text(paths: str, share: float) -> str:
    texts = ["".join(read_documents(find_file(path, "text"))) for path in paths.split(":")]
    return "".join(text[int(len(text) * (1 - share)) :] for text in texts)


TASKS.register("ppl", Ppl)
