"""Measures on this machine, and prints ratios from one run.

    python -m kvjax.bench decode                              seconds per decode step, by batch and context
    python -m kvjax.bench decode --against=transformers       beside Hugging Face transformers on the same weights
    python -m kvjax.bench rounds --policies='int4;kivi'       what a round costs, in decode steps
    python -m kvjax.bench kernels                             attention over coded keys, beside a copy of memory
    python -m kvjax.bench step --topologies=v6e:2x4           bytes of a step, compiled for TPUs that are not there

Ours and the peer take turns, case by case and repeat by repeat, so that whatever else the machine does falls on both;
the best repeat of each counts. Prompts are random, and no token stops a generation. Without a checkpoint at hand:

    python -m kvjax.bench decode --model=qwen3-8b --random_weights --dtype=bfloat16 --cases=16x16384
"""

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from kvjax._program import Settings, run
from kvjax.accounting import device_bytes
from kvjax.bench_decode import bench_decode, flag_values
from kvjax.bench_kernels import TOKENS, measure_kernels
from kvjax.bench_step import COLUMNS, MODELS, TOPOLOGIES, bench_step
from kvjax.cache import KVCache
from kvjax.decoder import read_statistics
from kvjax.decoding import init_cache, prefill
from kvjax.errors import UserError, unknown
from kvjax.folder import find_checkpoint
from kvjax.grammar import parse_policy, split_policies
from kvjax.peers import PEERS, Case, parse_case
from kvjax.policy import Policy
from kvjax.progress import Progress
from kvjax.report import new_report, write_json
from kvjax.rounds import make_room, room
from kvjax.statistics import Statistics
from kvjax.timing import run_steps
from models import load_model
from models.config import DTYPES
from models.transformer import Transformer

_COLUMNS = {
    "decode": {
        "ms/step": lambda row: f"{1000 * row['seconds_per_step']:.3f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "cache MB": lambda row: f"{row['cache_bytes'] / 1e6:,.1f}" if row["cache_bytes"] else "",
        "time / first": lambda row: f"{row['times_slower_than_first']:.2f}",
    },
    "rounds": {
        "ms/step": lambda row: f"{1000 * row['seconds_per_step']:.3f}",
        "ms/round": lambda row: f"{1000 * row['seconds_per_round']:.3f}",
        "round / step": lambda row: f"{row['steps_per_round']:.2f}",
        "share of time": lambda row: f"{row['share_of_time']:.2%}",
    },
    "kernels": {
        "runs": lambda row: row["implementation"],
        "MB": lambda row: f"{row['bytes'] / 1e6:,.1f}",
        "ms": lambda row: f"{1000 * row['seconds']:.3f}",
        "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:,.1f}",
        "of a copy": lambda row: f"{row['share_of_copy']:.0%}",
        "times as fast": lambda row: f"{row['times_as_fast_as_first']:.2f}",
    },
    "step": COLUMNS,
}
"""What is shown of each benchmark's rows."""

_WIDTH = 140  # of a table that goes into a file


def print_table(report: dict[str, Any]) -> None:
    """The rows, for people."""
    table = Table(title=f"{report['program']} on {report['device']['kind']}, {report['date']}")
    columns = _COLUMNS[report["program"].split()[-1]]
    for title in ("case", "", *columns):
        table.add_column(title, justify="left" if title in ("case", "") else "right")
    for row in report["rows"]:
        table.add_row(row["case"], row["name"], *(show(row) for show in columns.values()))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def bench_rounds(settings: Settings) -> dict[str, Any]:
    """Times decode steps with a round in them and steps without; returns the report."""
    values = settings.flags
    folder = find_checkpoint(values["model"].value)
    model = load_model(folder, dtype="float32")
    statistics = read_statistics(values["statistics"].value, folder, model)
    policies = [parse_policy(policy) for policy in split_policies(values["policies"].value)]
    cases = [parse_case(text) for text in values["cases"].value]
    report = new_report("kvjax.bench rounds", config=flag_values(values), policy=values["policies"].value)
    rows = []
    with Progress("measuring", unit="cases", total=len(cases), quiet=values["quiet"].value) as progress:
        for case in cases:
            repeats = values["repeats"].value
            rows += [
                _measure_rounds(model, policy, case, statistics=statistics, repeats=repeats) for policy in policies
            ]
            progress.advance(1)
    return {**report, "rows": rows}


@functools.partial(jax.jit, donate_argnames="cache")
def _one_round(cache: KVCache) -> KVCache:
    """A round in the rows that are due."""
    return make_room(cache, jnp.ones(cache.num_seen.shape, jnp.bool_))


def _measure_rounds(
    model: Transformer, policy: Policy, case: Case, *, statistics: Statistics | None, repeats: int
) -> dict[str, Any]:
    """One policy, after the context: the steps up to each round in one compiled loop, then the round alone.

    What calling a compiled function costs is taken off the round: the same call is timed when nothing is due.
    """
    sizes = policy.exact
    steps = sizes.sinks + sizes.window + sizes.round + (repeats + 2) * sizes.round
    cache = init_cache(model, policy, batch=case.batch, max_tokens=case.context + steps, statistics=statistics)
    tokens = np.random.default_rng(0).integers(0, model.cache_shape.vocab_size, (case.batch, case.context))
    _, cache = prefill(model, cache, jnp.asarray(tokens, jnp.int32))
    seconds: dict[str, list[float]] = {"step": [], "round": [], "call": []}

    def timed(name: str, function: Callable, *arguments: Any) -> KVCache:
        since = time.perf_counter()
        cache = jax.block_until_ready(function(*arguments))
        seconds[name].append(time.perf_counter() - since)
        return cache

    for _ in range(repeats + 1):
        count = int(np.asarray(room(cache))[0])
        cache = timed("step", run_steps, model, cache, jnp.int32(count))
        seconds["step"][-1] /= max(count, 1)
        cache = timed("round", _one_round, cache)
        cache = timed("call", _one_round, cache)
    step, with_round, call = (float(np.median(seconds[name][1:])) for name in ("step", "round", "call"))
    spent = with_round - call
    return {
        "case": str(case),
        "name": str(policy),
        "batch": case.batch,
        "context": case.context,
        "seconds_per_step": step,
        "seconds_per_round": spent,
        "steps_per_round": spent / step,
        "share_of_time": spent / (spent + sizes.round * step),
        "cache_bytes": device_bytes(cache.layers),
    }


def bench_kernels(settings: Settings) -> dict[str, Any]:
    """Times attention over segments of each kind; returns the report."""
    values = settings.flags
    on_cpu = jax.default_backend() == "cpu"
    default = ["1x4096"] if on_cpu else ["16x32768"]
    cases = [parse_case(text) for text in (values["cases"].value if values["cases"].present else default)]
    if any(case.context % TOKENS for case in cases):
        raise UserError(f"--cases: `kernels` wants contexts that are multiples of {TOKENS}, such as 1x4096.")
    report = new_report("kvjax.bench kernels", config=flag_values(values), policy="")
    rows = []
    with Progress("measuring", unit="cases", total=len(cases), quiet=values["quiet"].value) as progress:
        for case in cases:
            rows += measure_kernels(case, repeats=values["repeats"].value, calls=2 if on_cpu else 20)
            progress.advance(1)
    return {**report, "rows": rows}


BENCHMARKS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "decode": bench_decode,
    "rounds": bench_rounds,
    "kernels": bench_kernels,
    "step": bench_step,
}


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
    flags.DEFINE_bool(
        "random_weights", False, "`decode`: weights are drawn, and --model is a published shape.", flag_values=values
    )
    flags.DEFINE_enum("dtype", "float32", DTYPES, "Of weights and cache in `decode`.", flag_values=values)
    flags.DEFINE_string(
        "policies", "full", "Policies, separated by semicolons; the first is the base.", flag_values=values
    )
    flags.DEFINE_string("statistics", "", "File of statistics; those beside the weights if empty.", flag_values=values)
    flags.DEFINE_list("cases", cases, "BATCHxCONTEXT, comma-separated.", flag_values=values)
    flags.DEFINE_integer("new_tokens", 64, "Decode steps of each repeat.", flag_values=values)
    flags.DEFINE_integer("repeats", 3, "How often each is measured; the best counts.", flag_values=values)
    flags.DEFINE_list("models", MODELS, "Published models that `step` compiles.", flag_values=values)
    flags.DEFINE_list("topologies", TOPOLOGIES, "Slices of TPU chips that `step` compiles for.", flag_values=values)
    flags.DEFINE_list("layers", "2,4", "How many layers `step` compiles, two numbers, or all.", flag_values=values)
    flags.DEFINE_list("against", "", f"Peers to measure beside: {', '.join(PEERS)}.", flag_values=values)
    flags.DEFINE_string("peer_python", sys.executable, "The Python that has the peers.", flag_values=values)
    flags.DEFINE_string("report", None, "JSON file for the record of the run.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, allows_words=True))
