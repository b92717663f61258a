"""Evaluates policies on a model and tasks: one picture of quality against bytes and speed.

    python -m kvjax.evaluate
    python -m kvjax.evaluate --tasks='needle;dfs(nodes=24)' --policies='triattention(budget=64)+int4' --output=build/run
    python -m kvjax.evaluate --tasks='ppl(file=book.txt)' --policies='int8;turboquant(bits=4);kivi(bits=2)'
    python -m kvjax.evaluate --tasks=ppl --policies='SELECTIONS(budget=256)+CODECS' --output=build/all
    python -m kvjax.evaluate --config=configs/qwen3_tpu.py --tasks='gsm8k;niah(tokens=8000)' --policies=...

Every policy sees the same examples. `full` always runs, and beside each policy that evicts, at its budget: `random`,
`streaming`, and an oracle that knows which tokens will be attended to. Where `full` solves less than 95 % of a task, or
the oracle less than 90 % of what `full` does, or `random` more than 95 % of it, the table says that the others say
nothing about methods.

SELECTIONS and CODECS stand for every selection and every codec: each combination that can be is run, the others are
listed with the reason. `compilations` of a row says how often its decode step was compiled: once, or not at all where
an earlier row had the same shapes.

--output names a folder: report.json, table.md, every answer (answers/), and pictures. Started again with the same
settings, the program goes on where it stopped; more tasks or policies are added to what is there. `python -m
kvjax.pictures DIR` draws the pictures again.
"""

import dataclasses
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from kvjax._program import Settings, run
from kvjax.combinations import Combinations
from kvjax.companions import with_companions
from kvjax.compilations import compilations
from kvjax.concentration import concentration
from kvjax.decoder import load_configured, read_statistics
from kvjax.empty import fit_policy
from kvjax.errors import UserError, check_between, unknown
from kvjax.evaluation import QUESTIONS, Cell, Evaluator, make_cell
from kvjax.folder import find_checkpoint
from kvjax.material import check_symbols, material_for
from kvjax.pictures import draw_pictures, read_trace, write_trace
from kvjax.policy import Policy
from kvjax.progress import Progress
from kvjax.report import check_target, new_report, write_json, write_text
from kvjax.results import make_console, markdown_tables, terminal_tables
from kvjax.statistics import Statistics
from kvjax.task import Task
from kvjax.task_grammar import parse_task, split_tasks
from kvjax.text import Tokenizer
from kvjax.tracing import first_evicting, trace_kept
from models.transformer import Transformer

_SETTLED = ("examples", "seed", "batch")
"""Flags that decide the numbers; tasks, regimes and policies may be added to."""

_DECODING = "walk"
"""The compiled function that runs the decode step."""

_MOST_COMPILED = 32
"""Rows whose compiled functions are kept for other tasks of the same size. LLVM maps each function's pieces into memory
by themselves, and systems allow a process some ten thousand of these maps."""

_LONGEST_NAME = 160  # of a file of answers, before its ending

_MOMENTS = 96  # of a trace, about

_EXACT = "exact(sinks=4,window=16,round=16)"
_METHODS = "triattention(budget=64)", "h2o(budget=64)", "snapkv(budget=64,queries=16)", "keydiff(budget=64)", "int4"
_POLICIES = ";".join(f"{method}+{_EXACT}" for method in _METHODS)


class Folder:
    """What a run leaves: rows as they come, answers, tables.

    Args:
      path: of the folder, made if missing; None keeps the rows in memory alone.
      report: the record's head.

    Raises:
      UserError: the folder holds another run's record.
    """

    def __init__(self, path: Path | None, report: dict[str, Any]):
        self.path, self.report = path, {**report, "rows": []}
        if path is None:
            return
        check_target(path / "report.json")
        if (path / "report.json").exists():
            self.report["rows"] = _rows_of(path / "report.json", report)
        elif path.exists() and any(path.iterdir()):
            raise UserError(f"{path} is not empty and holds no report.json of this program; give another --output.")

    def row(self, task: str, question: str, policy: str) -> dict[str, Any] | None:
        """A row that is there already."""
        wanted = task, question, policy
        return next(
            (row for row in self.report["rows"] if (row["task"], row["question"], row["policy"]) == wanted), None
        )

    def add(self, row: dict[str, Any], outputs: list[dict[str, Any]]) -> None:
        """Writes a row, its answers before it."""
        self.report["rows"].append(row)
        if self.path is None:
            return
        if outputs:
            lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outputs)
            write_text(self._answers(row["task"], row["question"], row["policy"]), lines)
        write_json(self.path / "report.json", self.report)

    def _answers(self, task: str, question: str, policy: str) -> Path:
        name = re.sub(r"[^\w.,=()+-]+", "_", f"{task}.{question}.{policy}")
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return self.path / "answers" / f"{name}.jsonl"

    def first_answer(self, task: str, question: str) -> str:
        """What `full` answered to the first example; empty where nothing is generated."""
        path = self._answers(task, question, "full")
        return json.loads(path.read_text(encoding="utf-8").splitlines()[0])["output"] if path.exists() else ""

    def finish(self, rows: list[dict[str, Any]], *, command: str) -> None:
        """Writes the tables, and what was refused."""
        if self.path is not None:
            report = self.report
            head = f"`{command}`, {report['date'][:10]}, commit {report['commit']}, {report['device']['kind']}."
            write_text(self.path / "table.md", f"{head}\n\n{markdown_tables(rows, report['refused'])}")


def _rows_of(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same settings."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows, settings = list(found["rows"]), dict(found["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no report of this program; give another --output.") from error
    here = json.loads(json.dumps(report["settings"]))
    changed = sorted(name for name in {*settings, *here} if settings.get(name) != here.get(name))
    if changed:
        raise UserError(f"{path.parent} holds a run with other settings ({', '.join(changed)}); give another --output.")
    return rows


def fingerprint(folder: Path) -> str:
    """A short hash of a checkpoint: of the names and sizes of its weight files, and of what small ones hold."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        if size < 1 << 26:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def cells(
    settings: Settings, tasks: list[Task], tokenizer: Tokenizer, *, examples: int | None = None
) -> Iterator[Cell]:
    """Each task in each regime, with as many examples as are asked for or given."""
    values = settings.flags
    for task in tasks:
        material = material_for(task, tokenizer, chat=settings.config.chat)
        for question in values["questions"].value[: 1 if task.forced else None]:
            count, seed = examples or values["examples"].value, values["seed"].value
            yield make_cell(task, question, tokenizer=tokenizer, material=material, num_examples=count, seed=seed)


def evaluate(settings: Settings, tasks: list[Task], asked: Combinations, report: dict[str, Any]) -> Folder:
    """Runs what is not there yet, of what this model can have; returns the folder with the rows."""
    config, values = settings.config, settings.flags
    tokenizer, model = load_configured(config, quiet=values["quiet"].value)
    checkpoint = find_checkpoint(config.model)
    statistics = read_statistics(config.statistics, checkpoint, model)
    # A policy that this model cannot have ends the run before it has begun.
    asked.check(lambda policy: fit_policy(model.cache_shape, policy, model.placement, statistics))
    policies, report["refused"] = asked.policies, asked.refused
    for task in tasks:
        check_symbols(task, tokenizer)
    report["settings"]["weights"] = fingerprint(checkpoint)
    report["concentration"] = concentration(statistics)
    folder = Folder(Path(values["output"].value) if values["output"].value else None, report)
    batch = min(values["batch"].value, values["examples"].value)
    wanted = {name: values[name].value for name in ("speed", "divergence")}
    evaluator = Evaluator(model, tokenizer, statistics=statistics, batch=batch, **wanted)
    regimes = sum(1 if task.forced else len(values["questions"].value) for task in tasks)
    total, compiled = regimes * len(policies), 0
    with Progress("evaluating", unit="cells", total=total, quiet=values["quiet"].value) as progress:
        for cell in cells(settings, tasks, tokenizer):
            for policy in policies:
                if folder.row(cell.task.name, cell.question, str(policy)) is None:
                    if str(policy) != "full":
                        evaluator.begin(cell)  # what it compiles is not the policy's
                    since = time.monotonic()
                    with compilations() as counts:
                        row, outputs = evaluator.evaluate(cell, policy)
                    row["compilations"] = counts[_DECODING]
                    folder.add({**row, "seconds": time.monotonic() - since}, outputs)
                    compiled += bool(counts[_DECODING])
                    if compiled >= _MOST_COMPILED:
                        jax.clear_caches()
                        compiled = 0
                progress.advance(1)
    if folder.path is not None and values["pictures"].value:
        policy = first_evicting(policies)
        if policy is not None:
            firsts = cells(settings, tasks, tokenizer, examples=1)
            look_inside(folder, firsts, policy, tokenizer=tokenizer, model=model, statistics=statistics)
    return folder


def look_inside(
    folder: Folder,
    firsts: Iterable[Cell],
    policy: Policy,
    *,
    tokenizer: Tokenizer,
    model: Transformer,
    statistics: Statistics | None,
) -> None:
    """Writes what a policy keeps along the longest of the answers that `full` gave to first examples, if not there."""
    pairs = []
    for cell in firsts:
        text = folder.first_answer(cell.task.name, cell.question)
        pairs.append((cell, tokenizer.encode(text, add_special_tokens=False) if text else cell.answers[0]))
    cell, answer = max(pairs, key=lambda pair: len(pair[1]))
    name, found = f"{cell.task.name}, question {cell.question}", read_trace(folder.path)
    if found is not None and (found.task, found.policy) == (name, str(policy)):
        return
    then = cell.then[0] if cell.then else []
    answer = answer[: cell.max_tokens - len(cell.prompts[0]) - len(then)]
    every = max(-(-len(answer) // _MOMENTS), 1)
    sizes = {"max_tokens": cell.max_tokens, "statistics": statistics, "every": every}
    trace = trace_kept(model, policy, cell.prompts[0], then=then, answer=answer, **sizes)
    write_trace(folder.path, dataclasses.replace(trace, task=name))


def main(settings: Settings) -> int:
    """Runs the program."""
    values = settings.flags
    for question in values["questions"].value or [""]:
        if question not in QUESTIONS:
            raise unknown("place of the question", question, QUESTIONS)
    for name in ("examples", "batch"):
        check_between(f"--{name}", values[name].value, 1, 1 << 30)
    check_between("--seed", values["seed"].value, 0, 1 << 32)
    if values["model"].value:
        settings.config.model = values["model"].value
    tasks = list({task.name: task for task in map(parse_task, split_tasks(values["tasks"].value))}.values())
    if not tasks:
        raise UserError("--tasks names no task; see --help.")
    asked = Combinations(values["policies"].value)
    asked.policies = with_companions(asked.policies)
    report = new_report("kvjax.evaluate", config=settings.config.to_dict(), policy=values["policies"].value)
    shown = {"model": settings.config.model, "dtype": settings.config.dtype, "chat": settings.config.chat}
    report["settings"] = {**shown, "statistics": settings.config.statistics}
    report["settings"] |= {name: values[name].value for name in _SETTLED}
    folder = evaluate(settings, tasks, asked, report)
    names = [(task.name, question) for task in tasks for question in values["questions"].value]
    rows = [row for task, place in names for policy in asked.policies if (row := folder.row(task, place, str(policy)))]
    console = make_console()
    for table in terminal_tables(rows, asked.refused):
        console.print(table)
    if report["concentration"]:
        console.print(report["concentration"]["summary"])
    folder.finish(rows, command=f"python -m kvjax.evaluate {' '.join(sys.argv[1:])}".strip())
    if folder.path is not None and values["pictures"].value:
        for path in draw_pictures(folder.path, folder.report["rows"]):
            print(path)
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    flags.DEFINE_string("model", None, "Checkpoint folder or hub name; short for --config.model.", flag_values=values)
    flags.DEFINE_string("tasks", "needle;hops;dfs", "Tasks, separated by semicolons.", flag_values=values)
    flags.DEFINE_string("policies", _POLICIES, "Policies, separated by semicolons.", flag_values=values)
    flags.DEFINE_list("questions", "inside", f"Where the question is: {', '.join(QUESTIONS)}.", flag_values=values)
    flags.DEFINE_integer("examples", 100, "Examples of each task.", flag_values=values)
    flags.DEFINE_integer("seed", 2, "Decides the examples; training and calibration use 0 and 1.", flag_values=values)
    flags.DEFINE_integer("batch", 50, "Examples that are decoded together.", flag_values=values)
    flags.DEFINE_bool("speed", True, "Time decoding with each policy, too.", flag_values=values)
    flags.DEFINE_bool("divergence", True, "Lead policies along full's answers, too, for KL.", flag_values=values)
    flags.DEFINE_string("output", None, "Folder for report, tables, answers and pictures.", flag_values=values)
    flags.DEFINE_bool("pictures", True, "Draw pictures into the output folder.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, default_config="configs/tiny_cpu.py"))
