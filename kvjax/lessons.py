"""Rows to learn from: problems of tasks, questions and answers behind each context, and plain text.

    row      [ context | question | answer | question | answer | ... | padding ]
    weight   filler      0          1        0          1              0              text: a weight everywhere

A batch depends on seed and step alone. Rows to test on come from seeds of their own.
"""

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

from kvjax.byte_tokenizer import END_OF_TEXT_ID
from kvjax.corpus import Corpus
from kvjax.errors import UserError
from kvjax.filler import excerpts, sentences
from kvjax.symbols import num_tokens
from kvjax.task import TASKS, Example, Material
from kvjax.text import Tokenizer

TRAIN, TEST = 0, 1
"""Streams of random numbers that never meet."""

TEXT = "text"
NUM_BYTES = 256
_MORE = 64  # questions behind a context at most
_EXCERPTS = 0.5  # share of task rows whose filler is cut from books


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch to learn from.

    Attributes:
      tokens: `B T+1` int32.
      weights: `B T+1` float32, of each token as a target.
      first: `B` int32, where the first answer begins; 0 in rows of text.
      last: `B` int32, where it ends.
    """

    tokens: np.ndarray
    weights: np.ndarray
    first: np.ndarray
    last: np.ndarray


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises `UserError` for tasks that are unknown, or from which nothing can be learned."""
    for name in tasks_of(mix):
        if not hasattr(TASKS.get(name), "sized"):
            raise UserError(f"The task '{name}' has no rows to learn from; take it out of config.mix.")


def tasks_of(mix: Mapping[str, float]) -> tuple[str, ...]:
    """Tasks of a mix."""
    return tuple(name for name in mix if name != TEXT)


@dataclasses.dataclass(frozen=True)
class Lessons:
    """Makes batches.

    Attributes:
      tokenizer: has the symbols as tokens.
      corpus: texts.
      books: one string, from which filler is cut.
      text_weight: of each token of a row of text; an answer's tokens weigh 1.
      filler_weight: of each token of filler in a context.
    """

    tokenizer: Tokenizer
    corpus: Corpus
    books: str
    text_weight: float
    filler_weight: float

    def batch(self, step: int, *, mix: Mapping[str, float], seed: int, rows: int, tokens: int) -> Rows:
        """Rows of `tokens` + 1 tokens.

        Args:
          step: of the run.
          mix: task or "text" -> its share of the rows.
          seed: of the run.
          rows: B.
          tokens: T.
        """
        rng = np.random.default_rng((seed, TRAIN, step))
        shares = np.asarray(list(mix.values()), np.float64)
        drawn = rng.choice(len(shares), size=rows, p=shares / shares.sum())
        return self._stack([self._row(list(mix)[one], rng, tokens) for one in drawn])

    def test_rows(self, task: str, *, seed: int, rows: int, tokens: int) -> Rows:
        """Rows of one task that no step learns from."""
        rng = np.random.default_rng((seed, TEST, zlib.crc32(task.encode())))
        return self._stack([self._row(task, rng, tokens) for _ in range(rows)])

    def _row(self, name: str, rng: np.random.Generator, tokens: int) -> Rows:
        if name == TEXT:
            start = int(rng.integers(0, len(self.corpus.train) - tokens))
            row = self.corpus.train[start : start + tokens + 1]
            nowhere = np.zeros((), np.int32)
            return Rows(row, np.full(row.shape, self.text_weight, np.float32), nowhere, nowhere)
        filler = excerpts(self.books) if self.books and rng.random() < _EXCERPTS else sentences
        material = Material(filler=filler, count=num_tokens)
        # Half of the rows leave room for more questions: answers are what is learned from.
        size = tokens if rng.random() < 0.5 else int(rng.integers(tokens // 2, tokens + 1))
        task = TASKS.get(name).sized(rng, size)
        return self._fill(task.example(rng, material, more=_MORE), tokens)

    def _fill(self, example: Example, tokens: int) -> Rows:
        """The context, and as many whole questions and answers as there is room for."""
        row: list[int] = self._encode(example.context)
        weights = [self.filler_weight if token < NUM_BYTES else 0.0 for token in row]
        span = (0, 0)
        for place, (question, answer) in enumerate([(example.question, example.answer), *example.more]):
            asked, answered = self._encode(question), self._encode(answer)
            if place and len(row) + len(asked) + len(answered) > tokens + 1:
                break
            if not place:
                span = len(row) + len(asked), len(row) + len(asked) + len(answered)
            row += asked + answered
            weights += [0.0] * len(asked) + [1.0] * len(answered)
        padding = tokens + 1 - len(row)
        return Rows(
            np.asarray(row + [END_OF_TEXT_ID] * padding, np.int32),
            np.asarray(weights + [0.0] * padding, np.float32),
            *(np.asarray(place, np.int32) for place in span),
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @staticmethod
    def _stack(rows: list[Rows]) -> Rows:
        return Rows(*(np.stack([getattr(row, field.name) for row in rows]) for field in dataclasses.fields(Rows)))
