"""Decodes text with a compressed cache.

    python -m kvjax.decode                                       the model in the tree solves a task of its config
    python -m kvjax.decode --prompt='Call me Ishmael.'           streams to the terminal
    python -m kvjax.decode --config=configs/qwen3_tpu.py         another model; see the files in configs/
    python -m kvjax.decode --config.task='needle(tokens=400)'    a problem with a known answer; see kvjax/tasks/
    python -m kvjax.decode --prompts=in.jsonl --output=out.jsonl many prompts, in batches; goes on where it stopped
    python -m kvjax.decode --compare_with_full ...               beside the uncompressed cache, token by token

With --compare_with_full the uncompressed cache generates from the same prompts with the same seeds. The program shows
both texts, the first token that differs (counted from 0), KL(full || policy) at each token of the compressed cache's
text, and the bytes of both caches. Lines that begin with --- are the program's own; --quiet leaves them out.

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
from kvjax.comparison import Comparison, Difference
from kvjax.decoder import Decoder
from kvjax.errors import UserError
from kvjax.folder import find_file
from kvjax.posing import Posed, check_posable, pose
from kvjax.progress import Progress, status
from kvjax.prompts import Prompt, ResultFile, read_prompts
from kvjax.report import check_target, write_json
from kvjax.screen import note, shorten
from kvjax.task import Task
from kvjax.task_grammar import parse_task
from kvjax.token_loop import PADDING

_NO_MATTER = ("batch", "steps_per_dispatch", "mesh", "prompt", "task", "task_example", "max_tokens")
"""Settings that cannot change an answer."""


def decode_one(
    decoder: Decoder,
    tokens: list[int],
    *,
    seed: int,
    shown: str | None,
    comparison: Comparison | None,
    posed: Posed | None,
    quiet: bool,
) -> dict[str, Any]:
    """Streams the continuation of one prompt to standard output, and compares it where that is wanted.

    Args:
      decoder: the model and its settings.
      tokens: the prompt.
      seed: for sampling.
      shown: the prompt's text, where the continuation is shown behind it.
      comparison: with the uncompressed cache, or None.
      posed: the problem that the prompt is, or None.
      quiet: print texts alone.

    Returns:
      What is known of the answer, for the report.
    """
    after = [] if shown is None else tokens
    apart = not quiet and (comparison is not None or posed is not None)  # the answer stands on lines of its own
    if posed is not None and not quiet:
        note(posed.name)
    if shown is not None:
        print(shorten(shown) if posed else shown, end="\n" if apart and not shown.endswith("\n") else "", flush=True)
    if apart:
        note(str(decoder.policy))
    row = _stream(decoder, tokens, seed=seed, after=after, quiet=quiet)
    found: dict[str, Any] = {}
    if posed is not None:
        score = posed.score(decoder.tokenizer.decode(row))
        found["task"] = {**posed.record(), "score": score}
        if not quiet:
            note(posed.verdict(score))
    if comparison is not None:
        with status("decoding with the uncompressed cache", quiet=quiet):
            [one] = comparison.compare([tokens], [row], seeds=[seed], batch=1, after=[after])
        verdict = None
        if posed is not None:
            found["task"]["full_score"] = posed.score(decoder.tokenizer.decode(one.full_tokens))
            # What was expected is said once.
            verdict = posed.verdict(found["task"]["full_score"], says_expected=score >= 1)
        if not quiet:
            comparison.show(one, verdict=verdict)
            note(comparison.sizes())
    return found


def _stream(decoder: Decoder, tokens: list[int], *, seed: int, after: list[int], quiet: bool) -> list[int]:
    """Prints the continuation of a prompt as it comes; returns its tokens."""
    stream = decoder.tokenizer.stream(after=after)
    blocks = decoder.stream([tokens], seeds=[seed], batch=1)
    with status("compiling", quiet=quiet):
        first = next(blocks)
    row: list[int] = []
    for block in chain([first], blocks):
        new = block[0][block[0] != PADDING].tolist()
        row += new
        print(stream.push(new), end="", flush=True)
    print(stream.finish(), flush=True)
    return row


def decode_file(
    decoder: Decoder,
    prompts: Iterator[Prompt],
    results: ResultFile | None,
    *,
    comparison: Comparison | None,
    config: ConfigDict,
    quiet: bool,
) -> None:
    """Decodes the prompts of a file in batches; results go to the output file, or to standard output.

    A malformed line ends the run, after the good ones before it are finished and written.
    """
    ends = set(decoder.stop_tokens)
    fault: list[UserError] = []
    todo = _until_fault(decoder, prompts, results, fault)
    with Progress("decoding", unit="prompts", quiet=quiet) as progress:
        while batch := list(islice(todo, config.batch)):
            seeds = [_seed(prompt, config.sampling.seed) for prompt, _ in batch]
            rows: list[list[int]] = [[] for _ in batch]
            sources = [tokens for _, tokens in batch]
            for block in decoder.stream(sources, seeds=seeds, batch=config.batch):
                for row, new in zip(rows, block, strict=True):
                    row.extend(new[new != PADDING].tolist())
            # A reply begins a text; what follows a plain prompt goes on with one.
            after = [() if decoder.replies(prompt) else tokens for prompt, tokens in batch]
            differences: list[Difference | None] = [None] * len(batch)
            if comparison is not None:
                differences = comparison.compare(sources, rows, seeds=seeds, batch=config.batch, after=after)
            for (prompt, tokens), row, before, one in zip(batch, rows, after, differences, strict=True):
                text = decoder.tokenizer.continuation(row, after=before)
                if results is not None:
                    _write(results, prompt, text=text, sizes=(len(tokens), len(row)), ended=row[-1] in ends, one=one)
                    continue
                print(f"--- line {prompt.line}\n{text}", flush=True)
                if one is not None and not quiet:
                    comparison.show(one)
            progress.advance(len(batch))
    if fault:
        raise fault[0]


def _write(
    results: ResultFile, prompt: Prompt, *, text: str, sizes: tuple[int, int], ended: bool, one: Difference | None
) -> None:
    """Writes one line's result; `sizes` are its tokens, those of the prompt and new ones."""
    compared = {} if one is None else one.record()
    reason = "stop" if ended else "length"
    results.write(prompt, text=text, prompt_tokens=sizes[0], new_tokens=sizes[1], finish_reason=reason, **compared)


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


def _choose(config: ConfigDict, prompt: str | None) -> tuple[str, Task | None]:
    """The prompt of --prompt or the config, or the task that makes one."""
    if prompt is not None:
        return prompt, None
    if config.prompt is not None and config.task:
        raise UserError(
            "config.prompt and config.task are both set: give --prompt, which turns the task off, or unset one."
        )
    if config.task:
        if config.system_prompt:
            raise UserError("config.system_prompt goes with prompts; a task makes its own.")
        task = parse_task(config.task)
        check_posable(task, index=config.task_example)
        return "", task
    if config.prompt is None:
        raise UserError("There is no prompt: give --prompt='...', or set config.prompt or config.task.")
    return config.prompt, None


def _check(settings: Settings) -> None:
    """Raises `UserError` for flags that do not go together, and for files that cannot be written."""
    config, values = settings.config, settings.flags
    if values["prompt"].value is not None and values["prompts"].value:
        raise UserError("--prompt and --prompts exclude each other; give one.")
    if values["output"].value and not values["prompts"].value:
        raise UserError("--output goes with --prompts=FILE.jsonl.")
    if config.system_prompt and not config.chat and not values["prompts"].value:
        raise UserError("config.system_prompt goes with --config.chat.")
    for name in ("output", "report"):
        if values[name].value:
            check_target(values[name].value)


def main(settings: Settings) -> int:
    """Runs the program."""
    config, values = settings.config, settings.flags
    quiet, report, output = (values[name].value for name in ("quiet", "report", "output"))
    if values["compare_with_full"].value is not None:
        config.compare_with_full = values["compare_with_full"].value
    _check(settings)
    prompts, results, text, task = None, None, "", None
    if values["prompts"].value:
        prompts = read_prompts(find_file(values["prompts"].value, "prompts file"))
    else:
        text, task = _choose(config, values["prompt"].value)
    if output:
        settled = _flat({name: value for name, value in config.to_dict().items() if name not in _NO_MATTER})
        results = ResultFile(Path(output), settings=settled)
    decoder = Decoder(config, quiet=quiet)
    # What nobody would see is not compared.
    comparison = Comparison(decoder) if config.compare_with_full and (not quiet or report or output) else None
    finished, found = False, {}
    try:
        if prompts is not None:
            decode_file(decoder, prompts, results, comparison=comparison, config=config, quiet=quiet)
        else:
            posed = task and pose(task, decoder.tokenizer, index=config.task_example, chat=config.chat)
            tokens, shown = _source(decoder, text, posed, chat=config.chat)
            how = {"seed": config.sampling.seed, "comparison": comparison, "quiet": quiet}
            found = decode_one(decoder, tokens, shown=shown, posed=posed, **how)
        finished = True
    finally:
        if report and (finished or decoder.has_decoded):  # a mistake leaves an older report as it was
            compared = {} if comparison is None else {"comparison": comparison.report()}
            write_json(report, {**decoder.report(), **found, **compared})
    if not quiet and decoder.has_decoded:
        summed = f"\n{comparison.summary()}" if comparison and prompts is not None else ""
        print(f"\n{decoder.summary()}{summed}", file=sys.stderr)
    return 0


def _source(decoder: Decoder, text: str, posed: Posed | None, *, chat: bool) -> tuple[list[int], str | None]:
    """Tokens of the one prompt, and its text where that is shown."""
    if posed is None:
        return decoder.tokens(Prompt(line=0, text=text)), None if chat else text
    decoder.limit(max_new_tokens=posed.task.new_tokens, stop_tokens=posed.stop_tokens)
    decoder.check(posed.tokens, f"The prompt of {posed.name}")
    return posed.tokens, posed.text


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    beside = "Decode with the uncompressed cache too, and compare; short for --config.compare_with_full."
    flags.DEFINE_bool("compare_with_full", None, beside, flag_values=values)
    source = "The prompt; config.prompt, or a problem of config.task, if not given."
    flags.DEFINE_string("prompt", None, source, flag_values=values)
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts, one object a line.", flag_values=values)
    flags.DEFINE_string("output", None, "JSONL file for the results of --prompts.", flag_values=values)
    flags.DEFINE_string("report", None, "JSON file for the record of the run.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "Print the texts and errors only.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, default_config="configs/tiny_cpu.py", define_flags=define_flags))
