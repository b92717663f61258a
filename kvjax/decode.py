"""Decodes text with a compressed cache.

    python -m kvjax.decode                                       the model in the tree, a prompt of its config
    python -m kvjax.decode --prompt='Call me Ishmael.'           streams to the terminal
    python -m kvjax.decode --config=configs/qwen3_tpu.py         another model; see the files in configs/
    python -m kvjax.decode --prompts=in.jsonl --output=out.jsonl many prompts, in batches; goes on where it stopped

A line of a prompts file is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with "id" and
"seed" if wanted. Settings are overridden as --config.max_new_tokens=100 or --config.sampling.temperature=0.
"""

import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from kvjax._program import Settings, run
from kvjax.decoder import Decoder
from kvjax.errors import UserError
from kvjax.folder import find_file
from kvjax.progress import Progress, status
from kvjax.prompts import Prompt, ResultFile, read_prompts
from kvjax.report import check_target, write_json
from kvjax.token_loop import PADDING

_NO_MATTER = ("batch", "steps_per_dispatch", "mesh", "prompt", "max_tokens")
"""Settings that cannot change an answer."""


def decode_one(decoder: Decoder, text: str, *, seed: int, show_prompt: bool, quiet: bool) -> None:
    """Streams the continuation of one prompt to standard output."""
    tokens = decoder.tokens(Prompt(line=0, text=text))
    stream = decoder.tokenizer.stream(after=tokens if show_prompt else ())
    if show_prompt:
        print(text, end="", flush=True)
    blocks = decoder.stream([tokens], seeds=[seed], batch=1)
    with status("compiling", quiet=quiet):
        first = next(blocks)
    for block in chain([first], blocks):
        print(stream.push(block[0][block[0] != PADDING].tolist()), end="", flush=True)
    print(stream.finish(), flush=True)


def decode_file(
    decoder: Decoder, prompts: Iterator[Prompt], results: ResultFile | None, *, config: ConfigDict, quiet: bool
) -> None:
    """Decodes the prompts of a file in batches; results go to the output file, or to standard output.

    A malformed line ends the run, after the good ones before it are finished and written.
    """
    fault: list[UserError] = []
    todo = _until_fault(decoder, prompts, results, fault)
    with Progress("decoding", unit="prompts", quiet=quiet) as progress:
        while batch := list(islice(todo, config.batch)):
            seeds = [_seed(prompt, config.sampling.seed) for prompt, _ in batch]
            rows: list[list[int]] = [[] for _ in batch]
            for block in decoder.stream([tokens for _, tokens in batch], seeds=seeds, batch=config.batch):
                for row, new in zip(rows, block, strict=True):
                    row.extend(new[new != PADDING].tolist())
            for (prompt, tokens), row in zip(batch, rows, strict=True):
                _write(decoder, prompt, tokens=tokens, row=row, results=results)
            progress.advance(len(batch))
    if fault:
        raise fault[0]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _seed(prompt: Prompt, base: int) -> int:
    """A line's own seed, or one that follows from the run's and its number."""
    return (base + prompt.line) % 2**32 if prompt.seed is None else prompt.seed


def _until_fault(
    decoder: Decoder, prompts: Iterator[Prompt], results: ResultFile | None, fault: list[UserError]
) -> Iterator[tuple[Prompt, list[int]]]:
    """Yields prompts that are still to be done, with their tokens; at a bad one it ends and keeps the error."""
    try:
        for prompt in prompts:
            if results is None or not results.is_finished(prompt):
                yield prompt, decoder.tokens(prompt)
    except UserError as error:
        fault.append(error)


def _write(decoder: Decoder, prompt: Prompt, *, tokens: list[int], row: list[int], results: ResultFile | None) -> None:
    # A reply begins a text; what follows a plain prompt goes on with one.
    text = decoder.tokenizer.continuation(row, after=() if decoder.replies(prompt) else tokens)
    if results is None:
        print(f"--- line {prompt.line}\n{text}", flush=True)
        return
    ended = bool(row) and row[-1] in decoder.stop_tokens
    results.write(
        prompt,
        text=text,
        prompt_tokens=len(tokens),
        new_tokens=len(row),
        finish_reason="stop" if ended else "length",
    )


def main(settings: Settings) -> int:
    """Runs the program."""
    config, given = settings.config, {name: settings.flags[name].value for name in ("prompt", "prompts", "output")}
    report, quiet = settings.flags["report"].value, settings.flags["quiet"].value
    if given["prompt"] is not None and given["prompts"]:
        raise UserError("--prompt and --prompts exclude each other; give one.")
    if given["output"] and not given["prompts"]:
        raise UserError("--output goes with --prompts=FILE.jsonl.")
    if config.system_prompt and not config.chat and not given["prompts"]:
        raise UserError("config.system_prompt goes with --config.chat.")
    prompts = read_prompts(find_file(given["prompts"], "prompts file")) if given["prompts"] else None
    results = None
    for target in (given["output"], report):
        if target:
            check_target(target)
    if given["output"]:
        settled = _flat({name: value for name, value in config.to_dict().items() if name not in _NO_MATTER})
        results = ResultFile(Path(given["output"]), settings=settled)
    decoder = Decoder(config, quiet=quiet)
    finished = False
    try:
        if prompts is not None:
            decode_file(decoder, prompts, results, config=config, quiet=quiet)
        else:
            text = config.prompt if given["prompt"] is None else given["prompt"]
            decode_one(decoder, text, seed=config.sampling.seed, show_prompt=not config.chat, quiet=quiet)
        finished = True
    finally:
        if report and (finished or decoder.has_decoded):  # a mistake leaves an older report as it was
            write_json(report, decoder.report())
    if not quiet and decoder.has_decoded:
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
