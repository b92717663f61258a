"""Decodes text with a compressed cache.

    python -m kvjax.decode                                       the model in the tree, a prompt of its config
    python -m kvjax.decode --prompt='Call me Ishmael.'           streams to the terminal
    python -m kvjax.decode --config=configs/qwen3_tpu.py         another model; see the files in configs/
    python -m kvjax.decode --prompts=in.jsonl --output=out.jsonl many prompts, in batches; goes on where it stopped

A line of a prompts file is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with "id" and
"seed" if wanted. Settings are overridden as --config.max_new_tokens=100 or --config.sampling.temperature=0.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from kvjax._program import Settings, find_file, run
from kvjax.cache import device_bytes, full_cache_bytes
from kvjax.errors import UserError
from kvjax.folder import find_checkpoint, read_json
from kvjax.generation import Generator, check_prompts
from kvjax.policy import parse_policy
from kvjax.progress import Progress
from kvjax.prompts import Prompt, ResultFile, read_prompts
from kvjax.report import new_report, write_json
from kvjax.sampling import Sampling, check_sampling
from kvjax.sharding import make_mesh
from kvjax.text import Tokenizer, load_tokenizer
from kvjax.token_loop import PADDING
from models import load_model

_BUCKET_TOKENS = 128  # caches of unset max_tokens are made in multiples of this, so that few shapes compile


class Decoder:
    """A model, its tokenizer and its settings, ready to generate; sums up what it did for the report.

    Args:
      config: see `configs/base.py`.
    """

    def __init__(self, config: ConfigDict):
        self._config = config
        self.policy = parse_policy(config.policy)
        folder = find_checkpoint(config.model)
        self._sampling = read_sampling(config, folder)
        check_sampling(self._sampling)
        for name in ("batch", "max_new_tokens", "steps_per_dispatch"):
            if config[name] < 1:
                raise UserError(f"config.{name} is {config[name]}; it must be at least 1.")
        single_device = config.mesh.data == config.mesh.model == 1
        mesh = None if single_device else make_mesh(data=config.mesh.data, model=config.mesh.model)
        since = time.monotonic()
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer or folder)
        self.model = load_model(folder, mesh=mesh, dtype=config.dtype)
        self.load_seconds = time.monotonic() - since
        self._generators: dict[tuple[int, int], Generator] = {}
        self._totals = {name: 0.0 for name in ("compile_seconds", "prefill_seconds", "decode_seconds")}
        self._counts = {"prompt_tokens": 0, "new_tokens": 0, "decode_tokens": 0}
        self._bytes: dict[str, int] = {}

    def tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, through the chat template where that is wanted.

        Raises:
          UserError: the prompt is empty, or does not fit.
        """
        where = f"The prompt of line {prompt.line}" if prompt.line else "The prompt"
        if prompt.text is not None and not prompt.text:
            raise UserError(f"{where} is empty; give at least one character.")
        tokens = self._encode(prompt)
        room = self._config.max_tokens
        needed = len(tokens) + self._config.max_new_tokens - 1
        if not tokens:
            raise UserError(f"{where} has no tokens; give at least one character.")
        if room is not None and needed > room:
            raise UserError(
                f"{where} has {len(tokens)} tokens; with max_new_tokens={self._config.max_new_tokens} it needs "
                f"config.max_tokens of at least {needed}, and it is {room}."
            )
        return tokens

    def replies(self, prompt: Prompt) -> bool:
        """Whether a prompt goes through the chat template."""
        return prompt.messages is not None or self._config.chat

    def _encode(self, prompt: Prompt) -> list[int]:
        if not self.replies(prompt):
            return self.tokenizer.encode(prompt.text)
        messages = list(prompt.messages or [{"role": "user", "content": prompt.text}])
        if self._config.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._config.system_prompt})
        text = self.tokenizer.chat(messages, **self._config.template)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompts: Sequence[list[int]], *, seeds: Sequence[int]) -> Iterator[Any]:
        """Generates one batch; yields blocks of tokens, one row a prompt, -1 after a row's end."""
        generator = self._generator(prompts)
        num_new = 0
        for block in generator.stream(prompts, max_new_tokens=self._config.max_new_tokens, seeds=seeds):
            num_new += int((block != PADDING).sum())
            yield block
        timing = generator.timing
        for name in self._totals:
            self._totals[name] += getattr(timing, name)
        self._counts["prompt_tokens"] += sum(map(len, prompts))
        self._counts["new_tokens"] += num_new
        self._counts["decode_tokens"] += num_new - len(prompts)  # the first of each row comes with the prefill
        cache = generator.cache
        self._bytes = {"cache_bytes": device_bytes(cache.layers), "full_cache_bytes": full_cache_bytes(cache)}

    def _generator(self, prompts: Sequence[list[int]]) -> Generator:
        """The generator for a batch, made once for each number of rows and room."""
        config = self._config
        batch = 1 if len(prompts) == 1 else config.batch
        needed = max(map(len, prompts)) + config.max_new_tokens - 1
        room = config.max_tokens or -(-needed // _BUCKET_TOKENS) * _BUCKET_TOKENS
        check_prompts(prompts, max_tokens=room, max_new_tokens=config.max_new_tokens)
        if (batch, room) not in self._generators:
            self._generators[batch, room] = Generator(
                self.model,
                policy=self.policy,
                batch=batch,
                max_tokens=room,
                sampling=self._sampling,
                stop_tokens=self.tokenizer.stop_tokens if config.stop_at_end else (),
                steps_per_dispatch=config.steps_per_dispatch,
            )
        return self._generators[batch, room]

    def result_settings(self) -> dict[str, Any]:
        """What must agree for the results of two runs to stand in one file."""
        sampling = {name: getattr(self._sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        named = {name: self._config[name] for name in ("model", "max_new_tokens", "chat", "system_prompt")}
        return {**named, "policy": str(self.policy), "seed": self._config.sampling.seed, **sampling}

    @property
    def has_decoded(self) -> bool:
        """Whether a batch has been finished."""
        return bool(self._bytes)

    def report(self) -> dict[str, Any]:
        """What was decoded so far, with the keys that every report has."""
        seconds = self._totals["decode_seconds"]
        speed = self._counts["decode_tokens"] / seconds if seconds else None
        return {
            **new_report("kvjax.decode", config=self._config.to_dict(), policy=str(self.policy)),
            **self._bytes,
            "prompt_tokens": self._counts["prompt_tokens"],
            "new_tokens": self._counts["new_tokens"],
            "load_seconds": self.load_seconds,
            **self._totals,
            "tokens_per_second": speed,
            "rounds": 0,  # a cache that keeps every token exactly has none
            "evicted": 0,
        }

    def summary(self) -> str:
        """The report in one line, for people."""
        report = self.report()
        speed = report["tokens_per_second"]
        return (
            f"{report['prompt_tokens']} prompt + {report['new_tokens']} new tokens, "
            f"{f'{speed:,.0f}' if speed else 'no'} tokens/s, prefill {report['prefill_seconds']:.2f} s, "
            f"compilation {report['compile_seconds']:.1f} s; cache {report['cache_bytes']:,} bytes ({self.policy}), "
            f"uncompressed {report['full_cache_bytes']:,}"
        )


def read_sampling(config: ConfigDict, folder: Path) -> Sampling:
    """The config's sampling; what it leaves open follows the checkpoint's generation_config.json."""
    published = read_json(folder / "generation_config.json", default={})
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


def decode_one(decoder: Decoder, text: str, *, seed: int, show_prompt: bool) -> None:
    """Streams the continuation of one prompt to standard output."""
    tokens = decoder.tokens(Prompt(line=0, text=text))
    stream = decoder.tokenizer.stream(after=tokens if show_prompt else ())
    if show_prompt:
        print(text, end="", flush=True)
    for block in decoder.stream([tokens], seeds=[seed]):
        print(stream.push(block[0][block[0] != PADDING].tolist()), end="", flush=True)
    print(stream.finish(), flush=True)


def decode_file(decoder: Decoder, prompts: Iterator[Prompt], results: ResultFile | None, *, settings: Settings) -> None:
    """Decodes the prompts of a file in batches; results go to the output file, or to standard output.

    A malformed line ends the run, after the good ones before it are finished and written.
    """
    config = settings.config
    fault: list[UserError] = []
    todo = _until_fault(decoder, prompts, set() if results is None else results.finished, fault)
    with Progress("decoding", unit="prompts", quiet=settings.flags["quiet"].value) as progress:
        while batch := list(islice(todo, config.batch)):
            seeds = [config.sampling.seed + prompt.line if prompt.seed is None else prompt.seed for prompt, _ in batch]
            rows: list[list[int]] = [[] for _ in batch]
            for block in decoder.stream([tokens for _, tokens in batch], seeds=seeds):
                for row, new in zip(rows, block, strict=True):
                    row.extend(new[new != PADDING].tolist())
            for (prompt, tokens), row in zip(batch, rows, strict=True):
                _write(decoder, prompt, tokens=tokens, row=row, results=results)
            progress.advance(len(batch))
    if fault:
        raise fault[0]


def _until_fault(
    decoder: Decoder, prompts: Iterator[Prompt], finished: set[int], fault: list[UserError]
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yields prompts that are still to be done, with their tokens; at a bad one it ends and keeps the error."""
    try:
        for prompt in prompts:
            if prompt.line not in finished:
                yield prompt, decoder.tokens(prompt)
    except UserError as error:
        fault.append(error)


def _write(decoder: Decoder, prompt: Prompt, *, tokens: list[int], row: list[int], results: ResultFile | None) -> None:
    # A reply begins a text; what follows a plain prompt goes on with one.
    text = decoder.tokenizer.continuation(row, after=() if decoder.replies(prompt) else tokens)
    if results is None:
        print(f"--- line {prompt.line}\n{text}", flush=True)
        return
    ended = bool(row) and row[-1] in decoder.tokenizer.stop_tokens
    results.write(
        prompt,
        text=text,
        prompt_tokens=len(tokens),
        new_tokens=len(row),
        finish_reason="stop" if ended else "length",
    )


def main(settings: Settings) -> int:
    """Runs the program."""
    values, config = settings.flags, settings.config
    prompts_file, output, report = values["prompts"].value, values["output"].value, values["report"].value
    if values["prompt"].value is not None and prompts_file:
        raise UserError("--prompt and --prompts exclude each other; give one.")
    if output and not prompts_file:
        raise UserError("--output goes with --prompts=FILE.jsonl.")
    prompts = read_prompts(find_file(prompts_file, "prompts file")) if prompts_file else None
    decoder = Decoder(config)
    try:
        if prompts is not None:
            kept = decoder.result_settings()
            results = ResultFile(Path(output), settings=kept) if output else None
            decode_file(decoder, prompts, results, settings=settings)
        else:
            text = config.prompt if values["prompt"].value is None else values["prompt"].value
            decode_one(decoder, text, seed=config.sampling.seed, show_prompt=not config.chat)
    finally:
        if report and decoder.has_decoded:
            write_json(report, decoder.report())
    if not values["quiet"].value and decoder.has_decoded:
        print(f"\n{decoder.summary()}", file=sys.stderr)
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    flags.DEFINE_string("prompt", None, "The prompt; config.prompt if not given.", flag_values=values)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts, one object a line.", flag_values=values)
    flags.DEFINE_string("output", None, "JSONL file for the results of --prompts.", flag_values=values)
    flags.DEFINE_string("report", None, "JSON file for the record of the run.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "Print the text and errors only.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, default_config="configs/tiny_cpu.py", define_flags=define_flags))
