"""One cell of a table of policies: a policy on a task, the same examples for all policies.

    inside    [ context | question ]  prefilled and compressed together          -> answer
    after     [ context ]  prefilled and compressed, then [ question ]           -> answer

Answers are generated greedily and scored by the task. Then every policy is led along the answers that the uncompressed
cache gave, which shows how far it moves the model's distributions (`kvjax/forcing.py`).
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
from kvjax.forcing import Followed, compare, follow, num_common
from kvjax.generation import Generator
from kvjax.material import check_symbols
from kvjax.oracle import look_ahead, with_future, without_future
from kvjax.policy import Policy
from kvjax.results import interval
from kvjax.statistics import Statistics
from kvjax.task import Example, Material, Task, example_of
from kvjax.text import Tokenizer
from kvjax.timing import seconds_per_step
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
        self._generators: dict[tuple[str, int, str], Generator] = {}
        self._step_seconds: dict[tuple[str, int], float] = {}
        self._cell: Cell | None = None
        self._written: list[list[int]] = []  # by the uncompressed cache, for the newest cell
        self._base: list[Followed] = []

    def evaluate(self, cell: Cell, policy: Policy) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Runs a policy on a cell.

        Returns:
          The row for the report, and an object for each example: what was expected, what came, and its score.
        """
        if self._cell is not cell:
            self._cell, self._written, self._base = cell, [], []
            if str(policy) != "full":
                self.evaluate(cell, Policy())
        written, cache = ([], None) if cell.task.forced else self._generate(cell, policy)
        if not self._written:
            self._written = cell.answers if cell.task.forced else written
        named = {"task": cell.task.name, "question": cell.question, "policy": str(policy)}
        row = {**named, "examples": len(cell.examples)}
        if cell.task.forced or self._diverges:
            followed = self._follow(cell, policy)
            self._base = self._base or followed
            row |= _merge([compare(base, one) for base, one in zip(self._base, followed, strict=True)], followed)
            cache = followed[-1].cache if cache is None else cache
        outputs = [] if cell.task.forced else self._score(cell, written)
        if outputs:
            row |= _of_answers([one["score"] for one in outputs], written, self._written)
            row["facts"] = {name: [one["facts"].get(name) for one in outputs] for name in outputs[0]["facts"]}
        return row | self._of_cache(cell, policy, cache), outputs

    def _generator(self, cell: Cell, policy: Policy) -> Generator:
        key = (str(policy), cell.max_tokens, cell.task.stop)
        if key not in self._generators:
            stop = self._tokenizer.encode(cell.task.stop, add_special_tokens=False) if cell.task.stop else []
            self._generators[key] = Generator(
                self._model,
                policy=policy,
                statistics=self._statistics,
                batch=self._batch,
                max_tokens=cell.max_tokens,
                stop_tokens=[*stop, *self._tokenizer.stop_tokens],
            )
        return self._generators[key]

    def _generate(self, cell: Cell, policy: Policy) -> tuple[list[list[int]], KVCache]:
        """The answers to all examples, and the cache as the last batch left it."""
        generator, written = self._generator(cell, policy), []
        for start in range(0, len(cell.prompts), self._batch):
            part = slice(start, start + self._batch)
            written += generator.generate(
                cell.prompts[part],
                then=cell.then[part],
                max_new_tokens=cell.task.new_tokens,
                prepare=self._prepare(cell, policy, part),
            )
        return written, generator.cache

    def _follow(self, cell: Cell, policy: Policy) -> list[Followed]:
        """Distributions along the uncompressed cache's answers, batch by batch; all batches of one shape."""
        found = []
        for start in range(0, len(cell.prompts), self._batch):
            part = slice(start, start + self._batch)
            missing = self._batch - len(cell.prompts[part]) if start else 0

            def rows(all_rows: list[list[int]], part: slice = part, missing: int = missing) -> list[list[int]]:
                return [*all_rows[part], *all_rows[:missing]]

            followed = follow(
                self._model,
                policy,
                rows(cell.prompts),
                then=rows(cell.then),
                answers=rows(self._written),
                max_tokens=cell.max_tokens,
                statistics=self._statistics,
                prepare=self._prepare(cell, policy, part, missing),
            )
            counted = followed.counted & (np.arange(len(followed.counted)) < len(followed.counted) - missing)[:, None]
            found.append(dataclasses.replace(followed, counted=counted))
        return found

    def _prepare(
        self, cell: Cell, policy: Policy, part: slice, missing: int = 0
    ) -> Callable[[KVCache], KVCache] | None:
        """What tells an oracle the future: the uncompressed cache's answers."""
        if not is_oracle(policy):
            return None
        then = cell.then or [[]] * len(cell.prompts)
        whole = [a + b + c for a, b, c in zip(cell.prompts, then, self._written, strict=True)]
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
                self._step_seconds[key], _ = seconds_per_step(self._model, cache, count=_TIMED_STEPS)
            found["tokens_per_second"] = self._batch / self._step_seconds[key]
        return {**found, "layers": layers}


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
