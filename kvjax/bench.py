"""Measures on this machine, and prints ratios from one run.

    python -m kvjax.bench decode                              seconds per decode step, by batch and context
    python -m kvjax.bench decode --against=transformers       beside Hugging Face transformers on the same weights

Ours and the peer take turns, case by case and repeat by repeat, so that whatever else the machine does falls on both;
the best repeat of each counts. Weights and cache are float32. Prompts are random, and no token stops a generation.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from kvjax._program import Settings, run
from kvjax.cache import device_bytes
from kvjax.errors import UserError, unknown
from kvjax.folder import find_checkpoint
from kvjax.generation import Generator
from kvjax.policy import parse_policy
from kvjax.progress import Progress
from kvjax.report import new_report, write_json
from models import load_model
from models.transformer import Transformer

PEERS = ("transformers",)
_INSTALL = "pip install torch==2.13.0 transformers (in an environment of their own, then --peer_python=PATH)"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured: `batch` rows that have seen `context` tokens decode new ones."""

    batch: int
    context: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}"


class Ours:
    """This library with one policy."""

    def __init__(self, model: Transformer, policy: str):
        self.name = policy
        self._model = model
        self._made: tuple[Case, Generator] | None = None
        self.cache_bytes = 0

    def seconds_per_step(self, case: Case, new_tokens: int) -> float:
        """Seconds of one decode step, compilation, prefill and first token apart."""
        if self._made is None or self._made[0] != case:
            self._made = None  # frees the last case's cache first
            room = case.context + new_tokens
            generator = Generator(
                self._model, policy=self.name, batch=case.batch, max_tokens=room, steps_per_dispatch=new_tokens
            )
            self._made = case, generator
        generator = self._made[1]
        vocab_size = self._model.cache_shape.vocab_size
        prompts = np.random.default_rng(0).integers(0, vocab_size, (case.batch, case.context)).tolist()
        generator.generate(prompts, max_new_tokens=new_tokens + 1)
        self.cache_bytes = device_bytes(generator.cache.layers)
        return generator.timing.decode_seconds / generator.timing.decode_steps


class Transformers:
    """Hugging Face transformers, in a process of its own that answers one case at a time."""

    name = "transformers"
    cache_bytes = None

    def __init__(self, python: str, model: Path):
        self._model = str(model)
        script = Path(__file__).with_name("peer_transformers.py")
        self._faults = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close); what the peer says when it fails
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._faults}
        try:
            self._process = subprocess.Popen([python, str(script)], text=True, **pipes)
        except OSError as error:
            self._faults.close()
            raise UserError(f"There is no Python '{python}' to run transformers with: {error.strerror}.") from error
        hello = json.loads(self._process.stdout.readline() or '{"missing": "a working Python"}')
        self.missing: str | None = hello.get("missing")
        self.versions: dict[str, str] = hello.get("ready", {})

    def seconds_per_step(self, case: Case, new_tokens: int) -> float:
        """Seconds of one decode step, prefill and first token apart."""
        asked = {"model": self._model, "batch": case.batch, "context": case.context, "new_tokens": new_tokens}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._faults.seek(0)
            said = self._faults.read().strip().splitlines() or ["it said nothing"]
            raise UserError(f"transformers failed on {case}: {said[-1]}")
        return json.loads(answer)["seconds_per_step"]

    def close(self) -> None:
        """Ends the process."""
        with self._faults, self._process:  # closes the pipes and waits
            self._process.stdin.close()


def bench_decode(settings: Settings) -> dict[str, Any]:
    """Times decode steps of each policy and peer; returns the report."""
    values = settings.flags
    folder = find_checkpoint(values["model"].value)
    cases = [parse_case(text) for text in values["cases"].value]
    new_tokens, repeats = values["new_tokens"].value, values["repeats"].value
    policies = [str(parse_policy(policy)) for policy in values["policies"].value]
    model = load_model(folder, dtype="float32")
    report = new_report("kvjax.bench decode", config=_flag_values(values), policy=",".join(policies))
    rows = []
    peers = _peers(values["against"].value, values["peer_python"].value, folder)
    try:
        contenders = [*(Ours(model, policy) for policy in policies), *peers]
        with Progress("measuring", unit="cases", total=len(cases), quiet=values["quiet"].value) as progress:
            for case in cases:
                rows += _measure(case, contenders, new_tokens=new_tokens, repeats=repeats)
                progress.advance(1)
    finally:
        for peer in peers:
            report["versions"] |= peer.versions
            peer.close()
    return {**report, "rows": rows}


def _peers(names: list[str], python: str, folder: Path) -> list[Transformers]:
    """Starts the peers that are there; names those that are not."""
    started = []
    for name in names:
        if name not in PEERS:
            raise unknown("peer", name, PEERS)
        peer = Transformers(python, folder)
        if peer.missing:
            print(f"skipped {name}: {python} lacks {peer.missing}. To install: {_INSTALL}", file=sys.stderr)
            peer.close()
        else:
            started.append(peer)
    return started


def _measure(case: Case, contenders: list, *, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """One case: contenders take turns; the best repeat of each counts."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            seconds[contender.name].append(contender.seconds_per_step(case, new_tokens))
    base = min(seconds[contenders[0].name])
    return [
        {
            "case": str(case),
            "name": contender.name,
            "batch": case.batch,
            "context": case.context,
            "seconds_per_step": min(seconds[contender.name]),
            "tokens_per_second": case.batch / min(seconds[contender.name]),
            "times_slower_than_first": min(seconds[contender.name]) / base,
            "cache_bytes": contender.cache_bytes,
        }
        for contender in contenders
    ]


def parse_case(text: str) -> Case:
    """Reads "8x1024", batch times context."""
    batch, _, context = text.partition("x")
    if not (batch.isdigit() and context.isdigit() and int(batch) and int(context)):
        raise UserError(f"The case '{text}' is not BATCHxCONTEXT, such as 8x1024.")
    return Case(int(batch), int(context))


def _flag_values(values: flags.FlagValues) -> dict[str, Any]:
    return {name: values[name].value for name in values if name not in ("help", "h")}


def print_table(report: dict[str, Any]) -> None:
    """The rows, for people."""
    table = Table(title=f"{report['program']} on {report['device']['kind']}, {report['date']}")
    for title in ("case", "", "ms/step", "tokens/s", f"time / {report['rows'][0]['name']}"):
        table.add_column(title, justify="left" if title in ("case", "") else "right")
    for row in report["rows"]:
        milliseconds = f"{1000 * row['seconds_per_step']:.3f}"
        speed, ratio = f"{row['tokens_per_second']:,.0f}", f"{row['times_slower_than_first']:.2f}"
        table.add_row(row["case"], row["name"], milliseconds, speed, ratio)
    Console().print(table)


BENCHMARKS: dict[str, Callable[[Settings], dict[str, Any]]] = {"decode": bench_decode}


def main(settings: Settings) -> int:
    """Runs the program."""
    if len(settings.words) != 1:
        raise UserError(f"Name one benchmark: {', '.join(BENCHMARKS)}.")
    if settings.words[0] not in BENCHMARKS:
        raise unknown("benchmark", settings.words[0], BENCHMARKS)
    for name in ("new_tokens", "repeats"):
        if settings.flags[name].value < 1:
            raise UserError(f"--{name} is {settings.flags[name].value}; it must be at least 1.")
    report = BENCHMARKS[settings.words[0]](settings)
    print_table(report)
    if settings.flags["report"].value:
        write_json(settings.flags["report"].value, report)
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    cases = "1x64,8x64,1x8192,8x8192"
    flags.DEFINE_string("model", "models/tiny", "Checkpoint folder or hub name.", flag_values=values)
    flags.DEFINE_list("policies", "full", "Policies to measure; the first is the base.", flag_values=values)
    flags.DEFINE_list("cases", cases, "BATCHxCONTEXT, comma-separated.", flag_values=values)
    flags.DEFINE_integer("new_tokens", 64, "Decode steps of each repeat.", flag_values=values)
    flags.DEFINE_integer("repeats", 3, "How often each is measured; the best counts.", flag_values=values)
    flags.DEFINE_list("against", "", f"Peers to measure beside: {', '.join(PEERS)}.", flag_values=values)
    flags.DEFINE_string("peer_python", sys.executable, "The Python that has the peers.", flag_values=values)
    flags.DEFINE_string("report", None, "JSON file for the record of the run.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, allows_words=True))
