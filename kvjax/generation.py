"""Generates text: prefill once, then several decode steps per dispatch, so that Python is out of the loop.

    prompts -> padded to a bucket -> prefill -> first token
            -> decode `steps_per_dispatch` tokens in one compiled loop -> a block of tokens for the caller -> ...

A row that met a stop token takes no more tokens: it writes nothing into the cache and yields padding. The loop ends
when all rows have stopped. One compiled loop serves the whole generation; prompts compile once per bucket of lengths.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kvjax.cache import KVCache
from kvjax.decoding import LanguageModel, init_cache
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.model_shape import ModelShape
from kvjax.policy import Policy
from kvjax.sampling import Sampling, check_sampling
from kvjax.statistics import Statistics
from kvjax.token_loop import PADDING, DecodeState, decode_block, padded_rows, start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one generation, compilation apart.

    Attributes:
      compile_seconds: compilation of what had not been compiled yet.
      prefill_seconds: from the prompts to the first token.
      decode_seconds: from there to the last token.
      decode_steps: compiled steps run after the first token.
    """

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0


class Generator:
    """Generates batches of one shape with one set of compiled functions.

    Args:
      model: the model.
      policy: what the cache keeps.
      statistics: of the model, for policies that need them.
      batch: B, rows decoded together; a call with fewer prompts leaves rows idle.
      max_tokens: tokens, prompt and new ones together, that a row may see.
      sampling: how tokens are drawn.
      stop_tokens: ids that end a row; the one that it met is its last token.
      steps_per_dispatch: decode steps per compiled call, which is how often tokens arrive.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        policy: str | Policy = "full",
        statistics: Statistics | None = None,
        batch: int,
        max_tokens: int,
        sampling: Sampling = Sampling(),
        stop_tokens: Collection[int] = (),
        steps_per_dispatch: int = 16,
    ):
        check_sampling(sampling)
        if steps_per_dispatch < 1:
            raise UserError(f"steps_per_dispatch is {steps_per_dispatch}; it must be at least 1.")
        self._model, self._policy, self._statistics = model, parse_policy(policy), statistics
        self._batch, self._max_tokens = batch, max_tokens
        self._rule = {"sampling": sampling, "stop_tokens": tuple(sorted(set(stop_tokens)))}
        self._steps_per_dispatch = steps_per_dispatch
        self._compiled: dict[str | tuple[int, int], jax.stages.Compiled] = {}
        self.timing = Timing()
        """Of the newest generation; complete when its stream has ended."""
        self.cache: KVCache | None = None
        """The cache as the newest stream left it; valid until the next dispatch donates it."""

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        seeds: Sequence[int] = (),
        then: Sequence[Sequence[int]] = (),
        prepare: Callable[[KVCache], KVCache] | None = None,
    ) -> Iterator[np.ndarray]:
        """Generates; yields blocks of new tokens as they come.

        Args:
          prompts: 1 to B prompts, token ids, none empty.
          max_new_tokens: most new tokens a row, at least 1.
          seeds: one a prompt, for sampling, at least 0 and below 2**32; 0, 1, ... where absent.
          then: tokens that come behind each prompt when it has been compressed, e.g. a question that nobody knew
            before, at least one a row; nothing where absent.
          prepare: is given the empty cache, and gives the one to use.

        Yields:
          `len(prompts) n` int32, n at most `steps_per_dispatch`; -1 after a row's stop token. The first block is the
          one token that the prompt itself gives.

        Raises:
          UserError: a prompt is empty, holds an id outside the vocabulary, or does not fit `max_tokens` with its
            new tokens; or a seed is out of range.
        """
        self._check(prompts, then, max_new_tokens, seeds)
        if any(not len(more) for more in then):
            raise UserError("Every row needs at least one token in `then`, or give it without.")
        self.timing = Timing()
        state = self._first(prompts, seeds, then, prepare)
        yield np.asarray(state.tokens)[: len(prompts), None]
        remaining, spent = max_new_tokens - 1, 0.0
        while remaining > 0 and not bool(np.all(np.asarray(state.stopped))):
            steps = self._block_function(state)
            since = time.monotonic()
            state, block = steps(self._model, state, np.int32(remaining))
            rows = np.asarray(block)[: len(prompts)]
            spent += time.monotonic() - since
            self.cache = state.cache
            used = min(remaining, self._steps_per_dispatch, _width(rows))
            remaining -= used
            self.timing = dataclasses.replace(
                self.timing, decode_seconds=spent, decode_steps=self.timing.decode_steps + used
            )
            yield rows[:, :used]

    def generate(self, prompts: Sequence[Sequence[int]], **arguments: Any) -> list[list[int]]:
        """Generates to the end; arguments as for `stream`. Returns each prompt's new tokens, stop token included."""
        blocks = list(self.stream(prompts, **arguments))
        rows = np.concatenate(blocks, axis=1)
        return [row[row != PADDING].tolist() for row in rows]

    def _check(
        self, prompts: Sequence[Sequence[int]], then: Sequence[Sequence[int]], max_new_tokens: int, seeds: Sequence[int]
    ) -> None:
        """Raises `UserError` for what cannot be generated from."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
        if not 1 <= len(prompts) <= self._batch:
            raise UserError(f"{len(prompts)} prompts came; expected 1 to {self._batch}.")
        if any(not 0 <= seed < 2**32 for seed in seeds):
            raise UserError(f"The seeds {list(seeds)} must be at least 0 and below 2**32.")
        limits = {"max_tokens": self._max_tokens, "max_new_tokens": max_new_tokens}
        limits |= {"policy": self._policy, "shape": self._model.cache_shape}
        for index, (prompt, more) in enumerate(zip(prompts, then or [()] * len(prompts), strict=True)):
            check_prompt([*prompt, *more], name=f"Prompt {index}", num_read=len(prompt), **limits)

    def memory(self) -> dict[str, int]:
        """What the compiled decode loop needs besides its arguments, bytes per device.

        Raises:
          UserError: no generation has come as far as the loop.
        """
        if "block" not in self._compiled:
            raise UserError("The decode loop is not compiled yet: generate at least two tokens first.")
        analysis = self._compiled["block"].memory_analysis()
        return {"temporary_bytes": analysis.temp_size_in_bytes, "aliased_bytes": analysis.alias_size_in_bytes}

    def _first(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        then: Sequence[Sequence[int]],
        prepare: Callable[[KVCache], KVCache] | None,
    ) -> DecodeState:
        """Reads the prompts, padded to a bucket of lengths, and draws the first tokens."""
        tokens, lengths = padded_rows(prompts, batch=self._batch, most=self._max_tokens)
        row_seeds = np.zeros(self._batch, np.uint32)
        row_seeds[: len(prompts)] = seeds if seeds else range(len(prompts))
        self.cache = None  # the last one is freed before the next is made
        sizes = {"batch": self._batch, "max_tokens": self._max_tokens}
        cache = init_cache(self._model, self._policy, **sizes, statistics=self._statistics)
        cache = cache if prepare is None else prepare(cache)
        put = self._model.placement.put
        arguments = {"lengths": put(lengths, "B"), "keys": jax.vmap(jax.random.key)(put(row_seeds, "B"))}
        if then:
            asked, counts = padded_rows(then, batch=self._batch, most=self._max_tokens)
            arguments["then"] = (put(asked, "B T"), put(counts, "B"))
        placed = put(tokens, "B T")
        shapes = (tokens.shape[1], asked.shape[1] if then else 0)
        started = self._compile(shapes, start, self._model, cache, placed, **arguments, **self._rule)
        since = time.monotonic()
        state = jax.block_until_ready(started(self._model, cache, placed, **arguments))
        self.cache = state.cache
        self.timing = dataclasses.replace(self.timing, prefill_seconds=time.monotonic() - since)
        return state

    def _block_function(self, state: DecodeState) -> jax.stages.Compiled:
        """The compiled token loop."""
        static = {"num_steps": self._steps_per_dispatch, **self._rule}
        return self._compile("block", decode_block, self._model, state, np.int32(0), **static)

    def _compile(
        self, name: str | tuple[int, int], function: Callable, *args: Any, **kwargs: Any
    ) -> jax.stages.Compiled:
        """Compiles a function once per name and counts the time."""
        if name not in self._compiled:
            since = time.monotonic()
            self._compiled[name] = function.lower(*args, **kwargs).compile()
            spent = self.timing.compile_seconds + time.monotonic() - since
            self.timing = dataclasses.replace(self.timing, compile_seconds=spent)
        return self._compiled[name]


def _width(rows: np.ndarray) -> int:
    """Columns up to the last one in which some row has a token."""
    filled = np.flatnonzero((rows != PADDING).any(axis=0))
    return int(filled[-1]) + 1 if filled.size else 0


def check_prompt(
    tokens: Sequence[int],
    *,
    name: str,
    shape: ModelShape,
    max_tokens: int,
    max_new_tokens: int,
    policy: Policy,
    num_read: int | None = None,
) -> None:
    """Raises `UserError` for a prompt that cannot be generated from.

    Args:
      tokens: its token ids.
      name: what to call it in the message.
      shape: facts of the model.
      max_tokens: room of the cache.
      max_new_tokens: most new tokens.
      policy: what the cache keeps.
      num_read: how many of them are prefilled, and so pinned where the policy pins; all where absent.
    """
    if not len(tokens):
        raise UserError(f"{name} is empty; give at least one token.")
    outside = [token for token in tokens if not 0 <= token < shape.vocab_size]
    if outside:
        raise UserError(
            f"{name} has the token {outside[0]}, and the model's vocabulary ends at {shape.vocab_size - 1}: "
            "is the tokenizer the model's own?"
        )
    needed = len(tokens) + max_new_tokens - 1  # the last new token is never fed, so it needs no room
    if needed > max_tokens:
        raise UserError(
            f"{name} has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} it needs max_tokens of at least "
            f"{needed}, and it is {max_tokens}."
        )
    most, num_read = policy.most_pinned(shape=shape, max_tokens=max_tokens), num_read or len(tokens)
    if most is not None and num_read > most:
        raise UserError(
            f"{name} has {num_read} tokens, and the policy '{policy}' can pin {most}: give prompt({num_read}), "
            "or a larger budget."
        )


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    policy: str | Policy = "full",
    statistics: Statistics | None = None,
    sampling: Sampling = Sampling(),
    stop_tokens: Collection[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """Generates from prompts of any lengths, all in one batch.

    Args:
      model: the model.
      prompts: token ids, none empty.
      max_new_tokens: most new tokens a prompt, at least 1.
      policy: what the cache keeps.
      statistics: of the model, for policies that need them.
      sampling: how tokens are drawn; greedy by default.
      stop_tokens: ids that end a row.
      seed: for sampling; row i draws with seed + i.

    Returns:
      Each prompt's new tokens, the stop token included where one was met.

    Raises:
      UserError: no prompts, an empty one, or a value out of range.
    """
    longest = max((len(prompt) for prompt in prompts), default=1)
    generator = Generator(
        model,
        policy=policy,
        statistics=statistics,
        batch=max(len(prompts), 1),
        max_tokens=longest + max(max_new_tokens, 1),
        sampling=sampling,
        stop_tokens=stop_tokens,
    )
    return generator.generate(prompts, max_new_tokens=max_new_tokens, seeds=range(seed, seed + len(prompts)))
