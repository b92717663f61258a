"""Searches the best policy under a memory limit, and writes a config that kvjax.decode runs.

    python -m kvjax.tune --ratio=8 --output=build/found.py
    python -m kvjax.tune --bytes-per-token=512 --tasks='needle;dfs(nodes=24)' --output=build/found.py
    python -m kvjax.tune --config=configs/qwen3_tpu.py --tasks='gsm8k;niah(tokens=8000)' --ratio=4 --output=found.py
    python -m kvjax.decode --config=build/found.py

The limit is in bytes of the cache for each token of context: what the cache of one row takes on the device, over the
tokens that it has room for, in the smallest cache that a task needs (in larger ones what stays exact weighs less).
--ratio says the same as how many times smaller than the uncompressed cache.

Each task's examples are in two halves. Policies are searched on the first; the winner, and the best policies that are
one codec or one selection alone, then answer the second, which no search has seen. Stopped and started again with the
same settings, the program goes on where it was; --trials may grow.
"""

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags

from kvjax._program import Settings, run
from kvjax.accounting import bytes_per_token
from kvjax.candidates import Space
from kvjax.config_file import check_config_target, config_text
from kvjax.decoder import load_configured, read_statistics
from kvjax.empty import fit_policy
from kvjax.errors import UserError, check_between, unknown
from kvjax.evaluate import fingerprint
from kvjax.evaluation import QUESTIONS, Cell, Evaluator, make_cell
from kvjax.folder import find_checkpoint
from kvjax.grammar import parse_policy
from kvjax.judging import Judge, halves
from kvjax.material import material_for
from kvjax.policy import Policy
from kvjax.progress import Progress
from kvjax.report import new_report, write_text
from kvjax.results import make_console, terminal_tables
from kvjax.search import Found, Score, Trial, search
from kvjax.statistics import Statistics
from kvjax.task import Task
from kvjax.task_grammar import parse_task, split_tasks
from kvjax.terms import split_list
from kvjax.text import Tokenizer
from kvjax.trial_record import TrialRecord
from kvjax.tune_summary import Summary
from kvjax.verdict import compare_policies
from models.transformer import Transformer

_SELECTIONS = "triattention", "h2o", "snapkv(queries=16)", "keydiff", "rkv", "tova"
_CODECS = "int8;int4;turboquant(bits=3);turboquant(bits=2);turboquant(bits=1)"
_SETTLED = "selections", "codecs", "examples", "batch", "seed"
"""Flags that decide what a search comes to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tuned, and on what.

    Attributes:
      model: the model.
      tokenizer: its own.
      statistics: of the model, or None.
      searched: cells that policies are searched on.
      held_out: the same tasks with other examples.
    """

    model: Transformer
    tokenizer: Tokenizer
    statistics: Statistics | None
    searched: list[Cell]
    held_out: list[Cell]

    def sizes(self, policy: Policy) -> tuple[float, float]:
        """Most bytes a token over the tasks' caches, and uncompressed ones; `UserError` where it cannot be had."""
        named = {"placement": self.model.placement, "statistics": self.statistics}
        rooms = sorted({cell.max_tokens for cell in self.searched})
        found = [bytes_per_token(self.model.cache_shape, policy, max_tokens=room, **named) for room in rooms]
        return max(found)

    def can_have(self, policy: str) -> bool:
        """Whether the model suits a policy; most need nothing, some statistics."""
        try:
            fit_policy(self.model.cache_shape, parse_policy(policy), self.model.placement, self.statistics)
        except UserError:
            return False
        return True


def prepare(settings: Settings, tasks: list[Task]) -> Subject:
    """Loads the model and makes the examples."""
    config, values = settings.config, settings.flags
    tokenizer, model = load_configured(config, quiet=values["quiet"].value)
    statistics = read_statistics(config.statistics, find_checkpoint(config.model), model)
    searched, held_out = [], []
    for task in tasks:
        material = material_for(task, tokenizer, chat=config.chat)
        for question in values["questions"].value[: 1 if task.forced else None]:
            sizes = {"num_examples": 2 * values["examples"].value, "seed": values["seed"].value}
            cell = make_cell(task, question, tokenizer=tokenizer, material=material, **sizes)
            if len(cell.examples) < 2:
                raise UserError(f"The task '{task.name}' has one example; a search needs two, one to hold out.")
            first, second = halves(cell)
            searched.append(first)
            held_out.append(second)
    return Subject(model=model, tokenizer=tokenizer, statistics=statistics, searched=searched, held_out=held_out)


def space_for(subject: Subject, selections: str | None, codecs: str) -> Space:
    """What may be chosen; of the default selections those that the model suits."""
    given = split_list(selections) if selections is not None else filter(subject.can_have, _SELECTIONS)
    space = Space(selections=tuple(dict.fromkeys(given)), codecs=tuple(dict.fromkeys(split_list(codecs))))
    for policy in (*space.selections, *space.codecs):  # one that the model cannot have ends the run before it began
        fit_policy(subject.model.cache_shape, parse_policy(policy), subject.model.placement, subject.statistics)
    return space


def remembering(record: TrialRecord, subject: Subject, *, batch: int) -> Callable[[Policy], Score]:
    """A judge that asks the record first, and is made when it is needed."""
    judges: list[Judge] = []

    def judge(policy: Policy) -> Score:
        if (known := record.score(policy)) is not None:
            return known
        if not judges:
            sizes = {"statistics": subject.statistics, "batch": batch}
            judges.append(Judge(subject.model, subject.tokenizer, subject.searched, **sizes))
        score = judges[0](policy)
        jax.clear_caches()  # what was compiled for one policy serves no other
        return score

    return judge


def hold_out(subject: Subject, policies: list[str], record: TrialRecord, *, batch: int, quiet: bool) -> list[dict]:
    """Rows of policies on the examples that were held out, those of `full` first."""
    names = list(dict.fromkeys(["full", *policies]))
    settings = {"statistics": subject.statistics, "batch": batch, "speed": False}
    evaluator, rows = Evaluator(subject.model, subject.tokenizer, **settings), []
    with Progress("held-out half", unit="cells", total=len(names) * len(subject.held_out), quiet=quiet) as progress:
        for cell in subject.held_out:
            for name in names:
                row = record.row(cell.task.name, cell.question, name)
                if row is None:
                    row, _ = evaluator.evaluate(cell, parse_policy(name))
                    record.add_row(row)
                rows.append(row)
                progress.advance(1)
    return rows


def tune(settings: Settings, subject: Subject, record: TrialRecord, *, space: Space, limit: float) -> Found:
    """Searches, going on from what the record holds."""
    values = settings.flags
    with Progress("tuning", unit="policies", total=values["trials"].value, quiet=values["quiet"].value) as progress:

        def note(trial: Trial) -> None:
            record.add_trial(trial)
            progress.advance(1)

        found = search(
            space,
            limit=limit,
            size_of=lambda policy: subject.sizes(policy)[0],
            judge=remembering(record, subject, batch=values["batch"].value),
            trials=values["trials"].value,
            seconds=values["seconds"].value,
            seed=values["seed"].value,
            on_trial=note,
        )
    if not found.trials:
        refused = next(iter(found.refused.values()), "no time was given")
        raise UserError(f"No policy was tried: {refused}")
    return found


def best_alone(found: Found) -> list[str]:
    """The best codec alone and the best selection alone."""
    return [trial.policy for kind in ("codec", "selection") if (trial := found.best(kind))]


def limit_of(settings: Settings, subject: Subject) -> float:
    """The limit in bytes a token."""
    limit, ratio = (settings.flags[name].value for name in ("bytes_per_token", "ratio"))
    return limit if ratio is None else subject.sizes(Policy())[1] / ratio


def main(settings: Settings) -> int:
    """Runs the program."""
    values, output = settings.flags, Path(settings.flags["output"].value or "")
    check_flags(values)
    check_config_target(output)
    if values["model"].value:
        settings.config.model = values["model"].value
    tasks = list({task.name: task for task in map(parse_task, split_tasks(values["tasks"].value))}.values())
    if not tasks:
        raise UserError("--tasks names no task; see --help.")
    subject = prepare(settings, tasks)
    space, limit = space_for(subject, values["selections"].value, values["codecs"].value), limit_of(settings, subject)
    head = new_report("kvjax.tune", config=settings.config.to_dict())
    head["settings"] = {name: settings.config[name] for name in ("model", "dtype", "chat", "statistics")}
    head["settings"] |= {name: values[name].value for name in _SETTLED}
    head["settings"] |= {"limit": limit, "cells": [cell.name for cell in subject.searched], "space": space.axes()}
    head["settings"]["weights"] = fingerprint(find_checkpoint(settings.config.model))
    folder = Path(values["work"].value or Path("build", "tune", output.stem))
    record = TrialRecord(folder / "report.json", head)
    found = tune(settings, subject, record, space=space, limit=limit)
    winner, alone = found.best(), best_alone(found)
    rows = hold_out(subject, [winner.policy, *alone], record, batch=values["batch"].value, quiet=values["quiet"].value)
    verdicts = [compare_policies(rows, winner.policy, rival) for rival in alone if rival != winner.policy]
    summary = Summary(found=found, rows=rows, verdicts=verdicts, limit=limit, sizes=subject.sizes)
    settings.config.policy = winner.policy
    command = shlex.join(["python", "-m", "kvjax.tune", *sys.argv[1:]])
    write_text(output, config_text(settings.config, path=output, notes=summary.notes(head, command=command)))
    record.finish(**summary.facts())
    console = make_console()
    for line in (summary.table(), *terminal_tables(rows), *summary.sentences(), f"Written: {output}"):
        console.print(line)
    return 0


def check_flags(values: flags.FlagValues) -> None:
    """Raises `UserError` for values that no search can have."""
    if not values["output"].value:
        raise UserError("--output=CONFIG.py is missing: the config that is to be written.")
    if (values["bytes_per_token"].value is None) == (values["ratio"].value is None):
        raise UserError("Give the limit once: --bytes-per-token=BYTES, or --ratio=TIMES smaller than uncompressed.")
    for name in ("bytes_per_token", "ratio", "seconds"):
        if values[name].value is not None and not values[name].value > 0:
            raise UserError(f"--{name} is {values[name].value}; it must be above 0.")
    for question in values["questions"].value:
        if question not in QUESTIONS:
            raise unknown("place of the question", question, QUESTIONS)
    for name in ("examples", "batch", "trials"):
        check_between(f"--{name}", values[name].value, 1, 1 << 30)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""

    def text(name: str, default: str | None, told: str) -> None:
        flags.DEFINE_string(name, default, told, flag_values=values)

    def number(name: str, default: int, told: str) -> None:
        flags.DEFINE_integer(name, default, told, flag_values=values)

    text("model", None, "Checkpoint folder or hub name; short for --config.model.")
    text("tasks", "needle;hops;dfs", "Tasks, separated by semicolons.")
    flags.DEFINE_list("questions", "inside", f"Where the question is: {', '.join(QUESTIONS)}.", flag_values=values)
    flags.DEFINE_float("bytes_per_token", None, "Limit: bytes of one row's cache over its room.", flag_values=values)
    flags.DEFINE_float("ratio", None, "Limit: times smaller than the uncompressed cache.", flag_values=values)
    text("selections", None, f"Selections without budget; '' for none. Those of {', '.join(_SELECTIONS)} that suit.")
    text("codecs", _CODECS, "Codecs, from most bits to fewest.")
    number("examples", 50, "Examples of each task in each half.")
    number("batch", 50, "Examples that are decoded together.")
    number("seed", 3, "Decides examples and proposals; training, calibration and evaluation use 0, 1 and 2.")
    number("trials", 40, "Policies to try.")
    flags.DEFINE_float("seconds", None, "Begin no policy after that time.", flag_values=values)
    text("output", None, "The config file to write, NAME.py.")
    text("work", None, "Folder of report.json, from which a stopped search goes on; build/tune/NAME if not given.")
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, default_config="configs/tiny_cpu.py"))
