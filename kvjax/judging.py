"""A cheap judge of policies: does a policy give the answers that the uncompressed cache gave?

The uncompressed cache answers every problem once. A policy is then led along these answers, and an answer counts as it
was scored if the policy would have chosen each of its tokens: then it would have generated the same. Of tasks whose
text is given, the share of tokens on which both agree counts. One run gives accuracy and divergence.
"""

import dataclasses
import math

import numpy as np

from kvjax.evaluation import Cell, stop_tokens_of
from kvjax.forcing import divergence
from kvjax.policy import Policy
from kvjax.search import Score
from kvjax.statistics import Statistics
from kvjax.text import Tokenizer
from kvjax.walk import Followed, answer, follow
from models.transformer import Transformer


def halves(cell: Cell) -> tuple[Cell, Cell]:
    """The first and the second half of a cell's examples."""
    middle = len(cell.examples) // 2
    return _some(cell, slice(middle)), _some(cell, slice(middle, None))


def _some(cell: Cell, part: slice) -> Cell:
    names = ("examples", "prompts", "then", "answers")
    return dataclasses.replace(cell, **{name: getattr(cell, name)[part] for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batch:
    """Examples of a cell with what the uncompressed cache made of them."""

    cell: Cell
    answers: list[list[int]]
    scores: np.ndarray
    base: Followed


class Judge:
    """Scores policies on cells.

    Args:
      model: the model.
      tokenizer: its own.
      cells: tasks with their examples.
      statistics: of the model, for policies that need them.
      batch: examples that are decoded together, at most.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, cells: list[Cell], *, statistics: Statistics | None, batch: int
    ):
        self._model, self._tokenizer, self._statistics = model, tokenizer, statistics
        self._cells = {cell.name: [self._answered(part) for part in _batches(cell, batch)] for cell in cells}
        self._step = 1 / (len(cells) * max(len(cell.examples) for cell in cells))

    def __call__(self, policy: Policy) -> Score:
        """What a policy is worth."""
        tasks = {name: self._score(policy, batches) for name, batches in self._cells.items()}
        mean = {name: float(np.mean([task[name] for task in tasks.values()])) for name in ("accuracy", "kl")}
        return Score(**mean, step=self._step, tasks=tasks)

    def _score(self, policy: Policy, batches: list[_Batch]) -> dict[str, float]:
        """Accuracy and divergence on one cell."""
        right, nats = [], []
        for batch in batches:
            followed, base = self._follow(batch.cell, policy, batch.answers), batch.base
            found, wanted = (np.argmax(one.log_probabilities, axis=-1) for one in (followed, base))
            nats += divergence(base, followed)[base.counted].tolist()
            if batch.cell.task.forced:
                right += (found == wanted)[base.counted].tolist()
            else:
                same = np.all((found == base.targets) | ~base.counted, axis=1)
                right += np.where(same, batch.scores, 0.0).tolist()
        return {"accuracy": float(np.mean(right)), "kl": float(np.mean(nats))}

    def _answered(self, cell: Cell) -> _Batch:
        """A batch with the uncompressed cache's answers."""
        if cell.task.forced:
            base, scores = self._follow(cell, Policy(), cell.answers), np.ones(len(cell.examples))
        else:
            base = self._answer(cell)
            texts = map(self._tokenizer.decode, base.answers)
            scores = np.asarray([cell.task.score(*pair) for pair in zip(texts, cell.examples, strict=True)])
        base = dataclasses.replace(base, cache=None)  # its memory is let go
        return _Batch(cell=cell, answers=base.answers, scores=scores, base=base)

    def _answer(self, cell: Cell) -> Followed:
        return answer(
            self._model,
            Policy(),
            cell.prompts,
            then=cell.then,
            new_tokens=cell.task.new_tokens,
            stop_tokens=stop_tokens_of(cell.task, self._tokenizer),
            max_tokens=cell.max_tokens,
        )

    def _follow(self, cell: Cell, policy: Policy, answers: list[list[int]]) -> Followed:
        return follow(
            self._model,
            policy,
            cell.prompts,
            then=cell.then,
            answers=answers,
            max_tokens=cell.max_tokens,
            statistics=self._statistics,
        )


def _batches(cell: Cell, most: int) -> list[Cell]:
    """A cell's examples in batches as even as can be."""
    count = math.ceil(len(cell.examples) / most)
    edges = [round(index * len(cell.examples) / count) for index in range(count + 1)]
    return [_some(cell, slice(start, stop)) for start, stop in zip(edges, edges[1:], strict=False)]
