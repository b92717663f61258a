"""One cell of a table of policies: a policy on a task, the same examples for all policies.

    inside    [ context | question ]  prefilled and compressed together          -> answer
    after     [ context ]  prefilled and compressed, then [ question ]           -> answer

Answers are generated greedily and scored by the task. Where they are not those that the uncompressed cache gave, the
policy is led along these as well, which shows how far it moves the model's distributions (`kvjax/forcing.py`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from kvjax.accounting import account, device_bytes, full_cache_bytes, num_evicted
from kvjax.cache import KVCache
from kvjax.companions import is_oracle
from kvjax.errors import UserError
from kvjax.forcing import compare, num_common
from kvjax.material import check_symbols
from kvjax.oracle import look_ahead, with_future, without_future
from kvjax.policy import Policy
from kvjax.results import interval
from kvjax.statistics import Statistics
from kvjax.task import Example, Material, Task, example_of
from kvjax.text import Tokenizer
from kvjax.timing import seconds_per_step
from kvjax.walk import Followed, answer, follow
from models.transformer import Transformer

QUESTIONS = ("inside", "after")
"""Where the question is: prefilled with the context, or behind its compression."""

_ROOM = 128  # caches are made in multiples of this, so that tasks of about one size share compiled functions
_TIMED_STEPS = 128  # one round in them, where rounds are of the default size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """The examples of a task as tokens.

    Attributes:
      task: the task.
      question: one of `QUESTIONS`.
      examples: the problems.
      prompts: token ids of each, prefilled.
      then: token ids of each that come after compression; empty where there are none.
      answers: token ids of each right answer; of the scored text where it is given.
      max_tokens: room for all.
    """

    task: Task
    question: str
    examples: tuple[Example, ...]
    prompts: list[list[int]]
    then: list[list[int]]
    answers: list[list[int]]
    max_tokens: int

    @property
    def name(self) -> str:
        """For people and file names."""
        return f"{self.task.name}, {self.question}"


def make_cell(
    task: Task, question: str, *, tokenizer: Tokenizer, material: Material, num_examples: int, seed: int
) -> Cell:
    """Makes a task's examples and their tokens.

    Args:
      task: the task.
      question: one of `QUESTIONS`.
      tokenizer: the model's.
      material: for the task.
      num_examples: how many.
      seed: decides them, together with their number.

    Raises:
      UserError: the task needs tokens that the tokenizer does not have, or a file is missing.
    """
    check_symbols(task, tokenizer)
    count = min(num_examples, task.num_examples or num_examples)
    examples = tuple(example_of(task, material, seed=seed, index=index) for index in range(count))

    def encode(text: str, first: bool) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=first and material.chat is None)

    if task.forced:
        rows = [encode(example.context, True)[: task.tokens + task.new_tokens] for example in examples]
        prompts, answers = [row[: task.tokens] for row in rows], [row[task.tokens :] for row in rows]
        then: list[list[int]] = []
    else:
        contexts = [encode(example.context, True) for example in examples]
        questions = [encode(example.question, False) for example in examples]
        answers = [encode(example.answer, False) for example in examples]
        inside = question == "inside"
        if not inside and not all(questions):
            raise UserError(f"{task.name} has problems whose question is not apart: use --questions=inside.")
        prompts = [a + b for a, b in zip(contexts, questions, strict=True)] if inside else contexts
        then = [] if inside else questions
    longest = max(len(prompt) + (len(then[row]) if then else 0) for row, prompt in enumerate(prompts))
    room = -(-(longest + task.new_tokens) // _ROOM) * _ROOM
    return Cell(
        task=task,
        question=question,
        examples=examples,
        prompts=prompts,
        then=then,
        answers=answers,
        max_tokens=room,
    )


def stop_tokens_of(task: Task, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the task's own, and the tokenizer's."""
    own = tokenizer.encode(task.stop, add_special_tokens=False) if task.stop else []
    return [*own, *tokenizer.stop_tokens]


class Evaluator:
    """A model and what is kept between cells: compiled functions, and the uncompressed cache's answers.

    Args:
      model: the model.
      tokenizer: its own.
      statistics: of the model, for policies that need them.
      batch: examples that are decoded together.
      speed: whether decode steps are timed.
      divergence: whether policies are led along the answers of the uncompressed cache.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        statistics: Statistics | None,
        batch: int,
        speed: bool,
        divergence: bool = True,
    ):
        self._model, self._tokenizer, self._statistics = model, tokenizer, statistics
        self._batch, self._times, self._diverges = batch, speed, divergence
        self._step_seconds: dict[tuple[str, int], float] = {}
        self._cell: Cell | None = None
        self._base: list[Followed] = []  # the uncompressed cache's answers to the newest cell, batch by batch

    def begin(self, cell: Cell) -> None:
        """Has a cell answered by the uncompressed cache, if that is not known yet."""
        if self._cell is not cell:
            self.evaluate(cell, Policy())

    def evaluate(self, cell: Cell, policy: Policy) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Runs a policy on a cell.

        Returns:
          The row for the report, and an object for each example: what was expected, what came, and its score.
        """
        if str(policy) != "full":
            self.begin(cell)
        elif self._cell is not cell:
            self._cell, self._base = cell, []
        parts = range(0, len(cell.prompts), self._batch)
        own = [self._run(cell, policy, start) for start in parts]
        of_cache = self._of_cache(cell, policy, own[-1].cache)
        own = [dataclasses.replace(one, cache=None) for one in own]  # its memory is let go
        self._base = self._base or own
        row = {"task": cell.task.name, "question": cell.question, "policy": str(policy), "examples": len(cell.examples)}
        if cell.task.forced or self._diverges:
            followed = [self._beside(cell, policy, *pair) for pair in zip(parts, own, strict=True)]
            row |= _merge([compare(*pair) for pair in zip(self._base, followed, strict=True)], followed)
        if cell.task.forced:
            return row | of_cache, []
        written, base = (_rows(parts, len(cell.prompts)) for parts in (own, self._base))
        outputs = self._score(cell, written)
        row |= _of_answers([one["score"] for one in outputs], written, base)
        row["facts"] = {name: [one["facts"].get(name) for one in outputs] for name in outputs[0]["facts"]}
        return row | of_cache, outputs

    def _run(self, cell: Cell, policy: Policy, start: int, answers: Sequence[list[int]] | None = None) -> Followed:
        """One batch: its own answers; or along given ones, which are a text's where there is nothing to answer.

        All batches have one shape: the last is filled up with the cell's first rows, which do not count there.
        """
        part = slice(start, start + self._batch)
        count = len(cell.prompts[part])
        missing = self._batch - count if start else 0

        def rows(all_rows: Sequence[list[int]]) -> list[list[int]]:
            return [*all_rows[part], *all_rows[:missing]]

        given = {
            "then": rows(cell.then),
            "max_tokens": cell.max_tokens,
            "statistics": self._statistics,
            "prepare": self._prepare(cell, policy, part, missing),
        }
        answers = cell.answers if cell.task.forced else answers
        if answers is not None:
            found = follow(self._model, policy, rows(cell.prompts), answers=rows(answers), **given)
        else:
            given |= {"new_tokens": cell.task.new_tokens, "stop_tokens": stop_tokens_of(cell.task, self._tokenizer)}
            found = answer(self._model, policy, rows(cell.prompts), distributions=self._diverges, **given)
        counts = (np.arange(len(found.counted)) < count)[:, None]
        return dataclasses.replace(found, counted=found.counted & counts)

    def _beside(self, cell: Cell, policy: Policy, start: int, own: Followed) -> Followed:
        """Distributions along the uncompressed cache's answers to one batch; its own where these are the same."""
        base = self._base[start // self._batch]
        same = np.array_equal(own.counted, base.counted) and np.array_equal(own.targets, base.targets)
        return own if same else self._run(cell, policy, start, answers=self._written(cell))

    def _written(self, cell: Cell) -> list[list[int]]:
        """The uncompressed cache's answers to all examples."""
        return cell.answers if cell.task.forced else _rows(self._base, len(cell.prompts))

    def _prepare(
        self, cell: Cell, policy: Policy, part: slice, missing: int = 0
    ) -> Callable[[KVCache], KVCache] | None:
        """What tells an oracle the future: the uncompressed cache's answers."""
        if not is_oracle(policy):
            return None
        then = cell.then or [[]] * len(cell.prompts)
        whole = [a + b + c for a, b, c in zip(cell.prompts, then, self._written(cell), strict=True)]
        rows = [*whole[part], *whole[:missing]]

        def tell(cache: KVCache) -> KVCache:
            batch = cache.num_seen.shape[0]
            tokens, lengths = np.zeros((batch, cell.max_tokens), np.int32), np.zeros(batch, np.int32)
            for index, row in enumerate(rows):
                tokens[index, : len(row)], lengths[index] = row, len(row)
            return with_future(cache, look_ahead(self._model, jnp.asarray(tokens), jnp.asarray(lengths)))

        return tell

    def _score(self, cell: Cell, written: Sequence[list[int]]) -> list[dict[str, Any]]:
        """What came of each example."""
        found = []
        for example, tokens in zip(cell.examples, written, strict=True):
            text = self._tokenizer.decode(tokens)
            score = cell.task.score(text, example)
            found.append({"score": score, "expected": example.answer, "output": text, "facts": dict(example.facts)})
        return found

    def _of_cache(self, cell: Cell, policy: Policy, cache: KVCache) -> dict[str, Any]:
        """Bytes, evictions and speed."""
        real = without_future(cache) if is_oracle(policy) else cache
        took = account(real)
        layers = took.pop("layers")
        found = {
            **took,
            "cache_bytes": device_bytes(real.layers),
            "full_cache_bytes": full_cache_bytes(cache),
            "max_tokens": cell.max_tokens,
            "evicted": num_evicted(cache),
        }
        if self._times:
            key = (str(policy), cell.max_tokens)
            if key not in self._step_seconds:
                # The cache is full: what these steps give means nothing, what they take is what others take.
                self._step_seconds[key] = seconds_per_step(self._model, cache, count=_TIMED_STEPS)
            found["tokens_per_second"] = self._batch / self._step_seconds[key]
        return {**found, "layers": layers}


def _rows(parts: Sequence[Followed], count: int) -> list[list[int]]:
    """The answers of all batches, one after another."""
    return [tokens for part in parts for tokens in part.answers][:count]


def _merge(parts: list[dict[str, float]], followed: list[Followed]) -> dict[str, float]:
    """Comparisons of batches as one, weighted by their tokens; of high quantiles the largest."""
    weights = np.asarray([one.counted.sum() for one in followed], np.float64)

    def mean(numbers: list[float]) -> float:
        return float(np.average(numbers, weights=weights))

    merged = {name: mean([part[name] for part in parts]) for name in parts[0]}
    # Means of log-likelihoods are what batches have in common.
    merged["perplexity"] = math.exp(mean([math.log(part["perplexity"]) for part in parts]))
    merged["perplexity_change"] = math.expm1(mean([math.log1p(part["perplexity_change"]) for part in parts]))
    merged["kl_p999"] = max(part["kl_p999"] for part in parts)
    return {**merged, "tokens": int(weights.sum())}


def _of_answers(scores: list[float], written: list[list[int]], base: list[list[int]]) -> dict[str, Any]:
    """Accuracy with its interval, and how far answers agree with the uncompressed cache's."""
    low, high = interval(scores)
    agreement = [num_common(one, other) / max(len(other), 1) for one, other in zip(written, base, strict=True)]
    return {
        "accuracy": float(np.mean(scores)),
        "accuracy_low": low,
        "accuracy_high": high,
        "agreement": float(np.mean(agreement)),
        "scores": scores,
    }
