"""A model, its tokenizer and the settings of a run, ready to generate; sums up what it did."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kvjax.accounting import (
    account,
    describe_kept,
    device_bytes,
    full_cache_bytes,
    held_tokens,
    num_evicted,
    num_rounds,
)
from kvjax.attention import attention_implementations
from kvjax.empty import fit_policy
from kvjax.errors import UserError
from kvjax.folder import find_checkpoint, find_file, read_json
from kvjax.generation import Generator, check_prompt
from kvjax.grammar import parse_policy
from kvjax.policy import Policy
from kvjax.progress import status
from kvjax.prompts import Prompt
from kvjax.records import check_text
from kvjax.report import new_report
from kvjax.sampling import Sampling, check_sampling
from kvjax.sharding import make_mesh
from kvjax.statistics import Statistics
from kvjax.statistics_file import load_statistics
from kvjax.text import Tokenizer, load_tokenizer
from kvjax.token_loop import PADDING
from models import load_model
from models.transformer import Transformer

_NOT_FOLLOWED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "num_beams": 1}
"""Fields of generation_config.json that change the text, and the values at which they do not."""

_BUCKET_TOKENS = 128  # caches of unset max_tokens are made in multiples of this, so that few shapes compile


class Decoder:
    """A model, its tokenizer and its settings, ready to generate; sums up what it did for the report.

    Args:
      config: see `configs/base.py`.
      quiet: show no progress.

    Attributes:
      policy: what the cache keeps.
      tokenizer: the model's.
      model: the model.
      statistics: of the model, where there are some.
      sampling: how tokens are drawn.
      stop_tokens: ids that end an answer.
      max_new_tokens: most tokens of an answer.
    """

    def __init__(self, config: ConfigDict, *, quiet: bool = False):
        self._config = config
        self.policy = parse_policy(config.policy)
        folder = find_checkpoint(config.model)
        self.sampling = read_sampling(config, folder)
        check_sampling(self.sampling)
        for name in ("batch", "max_new_tokens", "steps_per_dispatch"):
            if config[name] < 1:
                raise UserError(f"config.{name} is {config[name]}; it must be at least 1.")
        since = time.monotonic()
        self.tokenizer, self.model = load_configured(config, quiet=quiet)
        self.statistics = read_statistics(config.statistics, folder, self.model)
        fit_policy(self.model.cache_shape, self.policy, self.model.placement, self.statistics)  # or says why not
        self.load_seconds = time.monotonic() - since
        self.stop_tokens: tuple[int, ...] = self.tokenizer.stop_tokens if config.stop_at_end else ()
        self.max_new_tokens: int = config.max_new_tokens
        self._generators: dict[tuple[Policy, int, int], Generator] = {}
        self._totals = {name: 0.0 for name in ("compile_seconds", "prefill_seconds", "decode_seconds")}
        self._counts = {"prompt_tokens": 0, "new_tokens": 0, "decode_tokens": 0, "rounds": 0, "evicted": 0}
        self._cache: dict[str, Any] = {}
        self._attention: dict[str, str] = {}
        self._bytes: dict[str, int | None] = {"cache_bytes": None, "full_cache_bytes": None}

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, through the chat template where that is wanted.

        Raises:
          UserError: the prompt is empty, or does not fit.
        """
        name = f"The prompt of line {prompt.line}" if prompt.line else "The prompt"
        if prompt.text is not None:
            check_text(prompt.text, name)
        tokens = [] if prompt.text == "" else self._encode(prompt)
        self.check(tokens, name)
        return tokens

    def check(self, tokens: Sequence[int], name: str) -> None:
        """Raises `UserError` for a prompt that is empty or does not fit.

        Args:
          tokens: its token ids.
          name: what to call it in the message.
        """
        new, room = self.max_new_tokens, self._config.max_tokens
        shape = self.model.cache_shape
        limit = len(tokens) + new if room is None else room
        check_prompt(tokens, name=name, shape=shape, max_tokens=limit, max_new_tokens=new, policy=self.policy)

    def limit(self, *, max_new_tokens: int, stop_tokens: Sequence[int]) -> None:
        """Makes answers end earlier: after so many tokens at most, and at these tokens too."""
        self.max_new_tokens = min(self.max_new_tokens, max_new_tokens)
        self.stop_tokens = tuple(sorted({*self.stop_tokens, *stop_tokens}))
        self._generators.clear()

    def replies(self, prompt: Prompt) -> bool:
        """Whether a prompt goes through the chat template."""
        return prompt.messages is not None or self._config.chat

    def _encode(self, prompt: Prompt) -> list[int]:
        if not self.replies(prompt):
            return self.tokenizer.encode(prompt.text)
        messages = list(prompt.messages or [{"role": "user", "content": prompt.text}])
        if self._config.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._config.system_prompt})
        variables = {name: value for name, value in self._config.template.items() if value is not None}
        text = self.tokenizer.chat(messages, **variables)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompts: Sequence[list[int]], *, seeds: Sequence[int], batch: int) -> Iterator[Any]:
        """Generates one batch; yields blocks of tokens, one row a prompt, -1 after a row's end.

        Args:
          prompts: token ids, 1 to `batch` of them.
          seeds: one a prompt.
          batch: rows that are compiled for; those without a prompt are idle.
        """
        generator = self.generator(prompts, batch=batch, policy=self.policy)
        num_new = 0
        for block in generator.stream(prompts, max_new_tokens=self.max_new_tokens, seeds=seeds):
            num_new += int((block != PADDING).sum())
            yield block
        timing = generator.timing
        for name in self._totals:
            self._totals[name] += getattr(timing, name)
        self._counts["prompt_tokens"] += sum(map(len, prompts))
        self._counts["new_tokens"] += num_new
        self._counts["decode_tokens"] += num_new - len(prompts)  # the first of each row comes with the prefill
        cache, generator.cache = generator.cache, None  # freed: the next batch may need another shape
        self._counts["rounds"] += num_rounds(cache)
        self._counts["evicted"] += num_evicted(cache)
        self._attention = attention_implementations(cache)
        self._cache = {**account(cache), "held_tokens": held_tokens(cache)[: len(prompts)].mean(axis=0).tolist()}
        if self.policy.evicts:
            self._cache["kept_positions"] = describe_kept(cache)  # of the first row
        self._bytes = {"cache_bytes": device_bytes(cache.layers), "full_cache_bytes": full_cache_bytes(cache)}

    def room(self, prompts: Sequence[list[int]]) -> int:
        """Tokens that the caches of a batch have room for."""
        needed = max(map(len, prompts)) + self.max_new_tokens - 1
        return self._config.max_tokens or -(-needed // _BUCKET_TOKENS) * _BUCKET_TOKENS

    def generator(self, prompts: Sequence[list[int]], *, batch: int, policy: Policy) -> Generator:
        """The generator for a batch, made once for each policy, number of rows and room."""
        room = self.room(prompts)
        key = (policy, batch, room)
        if key not in self._generators:
            self._generators[key] = Generator(
                self.model,
                policy=policy,
                statistics=self.statistics,
                batch=batch,
                max_tokens=room,
                sampling=self.sampling,
                stop_tokens=self.stop_tokens,
                steps_per_dispatch=self._config.steps_per_dispatch,
            )
        return self._generators[key]

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of the newest batch's cache on the device; None before the first."""
        return self._bytes["cache_bytes"]

    @property
    def has_decoded(self) -> bool:
        """Whether a batch has been finished."""
        return self._bytes["cache_bytes"] is not None

    @property
    def _tokens_per_second(self) -> float | None:
        """Tokens of the decode loop over its seconds; None if it did not run."""
        seconds = self._totals["decode_seconds"]
        return self._counts["decode_tokens"] / seconds if seconds else None

    def report(self) -> dict[str, Any]:
        """What was decoded so far, with the keys that every report has."""
        mesh = self.model.placement.mesh
        head = new_report("kvjax.decode", config=self._config.to_dict(), policy=str(self.policy), mesh=mesh)
        head["implementations"]["decode_attention"] = self._attention
        return {
            **head,
            **self._bytes,
            "prompt_tokens": self._counts["prompt_tokens"],
            "new_tokens": self._counts["new_tokens"],
            "load_seconds": self.load_seconds,
            **self._totals,
            "tokens_per_second": self._tokens_per_second,
            "rounds": self._counts["rounds"],
            "evicted": self._counts["evicted"],  # tokens, each layer and key/value head counted
            "cache": self._cache,  # of the last batch
        }

    def summary(self) -> str:
        """What was decoded so far in one line, for people."""
        counts, totals, size, speed = self._counts, self._totals, self._bytes, self._tokens_per_second
        evicted = f", {counts['evicted']:,} evicted over layers and heads" if self.policy.evicts else ""
        return (
            f"{counts['prompt_tokens']} prompt + {counts['new_tokens']} new tokens, "
            f"{f'{speed:,.0f}' if speed else 'no'} tokens/s, prefill {totals['prefill_seconds']:.2f} s, "
            f"compilation {totals['compile_seconds']:.1f} s; cache {size['cache_bytes']:,} bytes ({self.policy}), "
            f"uncompressed {size['full_cache_bytes']:,}{evicted}"
        )


def load_configured(config: ConfigDict, *, quiet: bool = False) -> tuple[Tokenizer, Transformer]:
    """The tokenizer and the model that a config names, on the mesh that it asks for."""
    folder = find_checkpoint(config.model)
    mesh = make_mesh(data=config.mesh.data, model=config.mesh.model)
    with status(f"loading {config.model}", quiet=quiet):
        tokenizer = load_tokenizer(config.tokenizer or folder)
        return tokenizer, load_model(folder, mesh=mesh, dtype=config.dtype)


def read_statistics(path: str | None, folder: Path, model: Transformer) -> Statistics | None:
    """Statistics of a model, checked against it.

    Args:
      path: the file that a config or a flag names; empty for the one that lies beside the weights.
      folder: the checkpoint's; may hold a `statistics.safetensors`.
      model: the model.

    Returns:
      The statistics; None where none are named and none lie beside the weights.
    """
    if path:
        advice = "Write it with python -m kvjax.calibrate, or check the path."
        return load_statistics(find_file(path, "statistics file", advice=advice), model.cache_shape)
    beside = folder / "statistics.safetensors"
    return load_statistics(beside, model.cache_shape) if beside.is_file() else None


def read_sampling(config: ConfigDict, folder: Path) -> Sampling:
    """The config's sampling; what it leaves open follows the checkpoint's generation_config.json."""
    published = read_json(folder / "generation_config.json", default={})
    ignored = [
        f"{name} {published[name]}"
        for name, off in _NOT_FOLLOWED.items()
        if published.get(name, off) not in (off, None)
    ]
    if ignored:
        print(f"note: generation_config.json asks for {', '.join(ignored)}, which is not supported", file=sys.stderr)
    if not published.get("do_sample"):
        published = {}
    elif published.get("temperature") is None:
        published = {**published, "temperature": 1.0}
    chosen = {}
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = config.sampling[name] if config.sampling[name] is not None else published.get(name)
        if value is not None:
            chosen[name] = value
    return Sampling(**chosen)
