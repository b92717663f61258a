"""Gathers statistics of a model's queries, keys and values from any text, for codecs that are fitted to them.

    python -m kvjax.calibrate --text=book.txt --output=statistics.safetensors
    python -m kvjax.calibrate --config=configs/qwen3_tpu.py --text=book.txt --output=qwen3.safetensors
    python -m kvjax.calibrate --tasks='needle;dfs;copy' --output=statistics.safetensors

The text streams through in rows; a few ten thousand tokens of any coherent text are enough. With --tasks, rows are
problems with their answers, of a seed that neither training nor evaluation uses. The file is used as
--config.statistics=FILE by the other programs, and as kvjax.load_statistics(FILE, model.cache_shape) from code.
"""

import datetime
import functools
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from kvjax._program import Settings, run
from kvjax.decoder import load_configured
from kvjax.errors import UserError, check_between
from kvjax.folder import find_file
from kvjax.material import check_symbols, material_for
from kvjax.progress import Progress
from kvjax.report import check_target, commit
from kvjax.statistics import Statistics, empty_statistics
from kvjax.statistics_file import save_statistics
from kvjax.task import Task, example_of
from kvjax.task_grammar import parse_task, split_tasks
from kvjax.text import Tokenizer
from models.transformer import Transformer

SEED = 1
"""Of the problems to calibrate on; training has 0, evaluation 2."""

_PIECE = 1 << 16  # characters that are tokenized together


def token_rows(path: Path, tokenizer: Tokenizer, *, row_tokens: int, most: int) -> Iterator[np.ndarray]:
    """Rows of a text's tokens, `row_tokens` each and the last one shorter, without holding the text.

    Args:
      path: a UTF-8 text.
      tokenizer: the model's.
      row_tokens: tokens of a row.
      most: tokens of all rows together at most.
    """
    held: list[int] = []
    given = 0
    for piece in _pieces(path):
        held += tokenizer.encode(piece, add_special_tokens=False)
        while len(held) >= row_tokens and given < most:
            count = min(row_tokens, most - given)
            yield np.asarray(held[:count], np.int32)
            held, given = held[row_tokens:], given + count
        if given >= most:
            return
    if held:
        yield np.asarray(held[: most - given], np.int32)


def solved_rows(tasks: Sequence[Task], tokenizer: Tokenizer, *, seed: int, most: int) -> Iterator[np.ndarray]:
    """Problems and their right answers as rows of tokens, each task in turn.

    Args:
      tasks: at least one; those whose problems come from files may run out.
      tokenizer: the model's.
      seed: decides the problems.
      most: tokens of all rows together at most; the last row may go beyond.
    """
    given = 0
    for index in itertools.count():
        left = [task for task in tasks if task.num_examples is None or index < task.num_examples]
        for task in left:
            if given >= most:
                return
            example = example_of(task, material_for(task, tokenizer, chat=False), seed=seed, index=index)
            row = tokenizer.encode(example.context + example.question + example.answer, add_special_tokens=False)
            yield np.asarray(row, np.int32)
            given += len(row)
        if not left:
            return


def _pieces(path: Path) -> Iterator[str]:
    """A text in pieces of whole lines, so that few tokens are cut."""
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(_PIECE):
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from error


@functools.partial(jax.jit, donate_argnames="layers")
def observe_rows(model: Transformer, layers: tuple, tokens: jax.Array, positions: jax.Array) -> tuple:
    """Statistics with rows of tokens counted in; tokens at position -1 are padding."""
    return model(tokens, positions=positions, layers=layers, phase="calibrate")[1]


def calibrate(
    model: Transformer, rows: Iterator[np.ndarray], *, batch: int, row_tokens: int, heads: int = 1, progress: Any = None
) -> Statistics:
    """Gathers statistics.

    Args:
      model: the model.
      rows: token ids, `row_tokens` a row at most.
      batch: rows that are run together.
      row_tokens: of the longest row.
      heads: neighbouring key/value heads whose moments are gathered together, a divisor of K.
      progress: is told of tokens as they are done.

    Raises:
      UserError: no rows came, or `heads` does not divide K.
    """
    shape = model.cache_shape
    if shape.num_kv_heads % heads:
        raise UserError(f"heads is {heads}; it must divide the model's {shape.num_kv_heads} key/value heads.")
    layers, total = empty_statistics(shape, heads=heads), 0
    for group in _groups(rows, batch):
        tokens = np.zeros((batch, row_tokens), np.int32)
        positions = np.full((batch, row_tokens), -1, np.int32)
        for index, row in enumerate(group):
            tokens[index, : len(row)] = row
            positions[index, : len(row)] = np.arange(len(row))
        layers = observe_rows(model, layers, jnp.asarray(tokens), jnp.asarray(positions))
        jax.block_until_ready(layers)
        count = sum(map(len, group))
        total += count
        if progress is not None:
            progress.advance(count)
    if not total:
        raise UserError("The text is empty: nothing to gather statistics from.")
    host = jax.tree.map(np.asarray, layers)
    return Statistics(host, shape, about={"tokens": total})


def _groups(rows: Iterator[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    """Rows in groups of `batch`."""
    group: list[np.ndarray] = []
    for row in rows:
        group.append(row)
        if len(group) == batch:
            yield group
            group = []
    if group:
        yield group


def main(settings: Settings) -> int:
    """Runs the program."""
    config, values = settings.config, settings.flags
    if not values["output"].value:
        raise UserError("--output=FILE is needed; see --help.")
    tasks = [parse_task(text) for text in split_tasks(values["tasks"].value or "")]
    if bool(values["text"].value) == bool(tasks):
        raise UserError("Give --text=FILE or --tasks=NAMES, one of them; see --help.")
    for name in ("tokens", "row_tokens", "batch", "heads"):
        check_between(f"--{name}", values[name].value, 1, 1 << 40)
    check_target(values["output"].value)
    path = find_file(values["text"].value, "text") if values["text"].value else None
    quiet = values["quiet"].value
    tokenizer, model = load_configured(config, quiet=quiet)
    row_tokens, most = values["row_tokens"].value, values["tokens"].value
    if path is None:
        for task in tasks:
            check_symbols(task, tokenizer)
        solved = list(solved_rows(tasks, tokenizer, seed=SEED, most=most))
        rows, row_tokens = iter(solved), max(map(len, solved))
    else:
        rows = token_rows(path, tokenizer, row_tokens=row_tokens, most=most)
    source = values["tasks"].value if path is None else path.name
    with Progress("calibrating", unit="tokens", quiet=quiet) as progress:
        statistics = calibrate(
            model,
            rows,
            batch=values["batch"].value,
            row_tokens=row_tokens,
            heads=values["heads"].value,
            progress=progress,
        )
    statistics.about.update(
        text=source,
        model=config.model,
        commit=commit(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    save_statistics(values["output"].value, statistics)
    print(f"{values['output'].value}: statistics of {statistics.about['tokens']:,} tokens of {source}")
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    flags.DEFINE_string("text", None, "UTF-8 text file to read.", flag_values=values)
    flags.DEFINE_string("tasks", None, "Or tasks whose problems are read, separated by semicolons.", flag_values=values)
    flags.DEFINE_string("output", None, "Statistics file to write (safetensors).", flag_values=values)
    flags.DEFINE_integer("tokens", 100_000, "Tokens to read at most.", flag_values=values)
    flags.DEFINE_integer("row_tokens", 1024, "Tokens of a row of text, seen together.", flag_values=values)
    flags.DEFINE_integer("batch", 4, "Rows that are run together.", flag_values=values)
    flags.DEFINE_integer("heads", 1, "Neighbouring key/value heads to gather together.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, default_config="configs/tiny_cpu.py"))
