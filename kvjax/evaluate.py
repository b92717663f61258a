"""Evaluates policies on a model, and prints one table.

    python -m kvjax.evaluate --policies='int8;turboquant(bits=4);kivi(bits=2)'
    python -m kvjax.evaluate --config=configs/qwen3_tpu.py --text=book.txt --policies=... --report=table.json

Tasks:
  ppl   perplexity of held-out text, and the divergence of every next-token distribution from the uncompressed cache's;
        beside it the cache's bytes and the speed of decoding with it

`full` always runs first: the others are compared with it. Policies are separated by semicolons, or by commas outside
parentheses. Rows are written to the report as they come, so an interrupted run keeps what it finished.
"""

import sys
import time
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from kvjax._program import Settings, run
from kvjax.accounting import account, full_cache_bytes, num_evicted
from kvjax.corpus import read_documents
from kvjax.decoder import load_configured, read_statistics
from kvjax.empty import fit_policy
from kvjax.errors import UserError, check_between, unknown
from kvjax.folder import find_checkpoint, find_file
from kvjax.grammar import parse_policy, split_policies
from kvjax.perplexity import Scores, compare, score
from kvjax.policy import Policy
from kvjax.progress import Progress
from kvjax.report import check_target, new_report, write_json
from kvjax.text import Tokenizer
from kvjax.timing import seconds_per_step

TASKS = ("ppl",)

_RECORDED = ("tasks", "text", "held_out_share", "tokens", "rows", "prefix")
"""Flags that decide the numbers."""

_TIMED_STEPS = 128  # one round in them, where rounds are of the default size

_COLUMNS = {
    "policy": "{}",
    "key_bits": "{:.3f}",
    "value_bits": "{:.3f}",
    "ratio_to_dtype": "{:.2f}",
    "perplexity": "{:.4f}",
    "perplexity_change": "{:+.3%}",
    "kl_mean": "{:.5f}",
    "kl_p999": "{:.3f}",
    "top1_agreement": "{:.2%}",
    "tokens_per_second": "{:,.0f}",
}
_TITLES = (
    *("policy", "key bits", "value bits", "times smaller", "perplexity", "change"),
    *("KL", "KL p99.9", "top-1", "tokens/s"),
)


def text_rows(
    paths: list[str], tokenizer: Tokenizer, *, held_out_share: float, num_rows: int, row_tokens: int
) -> np.ndarray:
    """Evenly spaced rows of the held-out ends of texts, `num_rows row_tokens` int32.

    Args:
      paths: files, relative to here or to the project's root; see `kvjax.corpus.read_documents`.
      tokenizer: the model's.
      held_out_share: share of each file, its end, that is used, in (0, 1].
      num_rows: rows.
      row_tokens: tokens of each.

    Raises:
      UserError: a file is missing, or together they are too short.
    """
    tokens: list[int] = []
    for path in paths:
        text = "".join(read_documents(find_file(path, "text")))
        tokens += tokenizer.encode(text[int(len(text) * (1 - held_out_share)) :], add_special_tokens=False)
    if len(tokens) < row_tokens:
        raise UserError(
            f"The held-out texts have {len(tokens)} tokens, fewer than a row of {row_tokens}: give more with --text or "
            "--held_out_share."
        )
    starts = np.linspace(0, len(tokens) - row_tokens, num_rows).astype(np.int64)
    return np.stack([np.asarray(tokens[start : start + row_tokens], np.int32) for start in starts])


def evaluate_perplexity(settings: Settings, policies: list[Policy], report: dict[str, Any]) -> None:
    """Fills the report's rows, one a policy."""
    config, values = settings.config, settings.flags
    tokenizer, model = load_configured(config, quiet=values["quiet"].value)
    rows = text_rows(
        values["text"].value,
        tokenizer,
        held_out_share=values["held_out_share"].value,
        num_rows=values["rows"].value,
        row_tokens=values["prefix"].value + -(-values["tokens"].value // values["rows"].value),
    )
    statistics = read_statistics(config.statistics, find_checkpoint(config.model), model)
    for policy in policies:  # a policy that this model cannot have ends the run before it has begun
        fit_policy(model.cache_shape, policy, model.placement, statistics)
    base: Scores | None = None
    with Progress("evaluating", unit="policies", total=len(policies), quiet=values["quiet"].value) as progress:
        for policy in policies:
            since = time.monotonic()
            scores = score(model, policy, rows, prefix=values["prefix"].value, statistics=statistics)
            base = scores if base is None else base
            row = _row(policy, base, scores)
            if values["speed"].value:
                # The cache is full: what these steps give means nothing, what they take is what others take.
                step, _ = seconds_per_step(model, scores.cache, count=_TIMED_STEPS)
                row["tokens_per_second"] = rows.shape[0] / step
            row["seconds"] = time.monotonic() - since
            report["rows"].append(row)
            if values["report"].value:
                write_json(values["report"].value, report)
            progress.advance(1)


def _row(policy: Policy, base: Scores, scores: Scores) -> dict[str, Any]:
    """What is reported of one policy."""
    took = account(scores.cache)
    layers = took.pop("layers")
    return {
        "task": "ppl",
        "policy": str(policy),
        "tokens": int(scores.targets.size),
        **compare(base, scores),
        **took,
        "cache_bytes": took["device_bytes"],
        "full_cache_bytes": full_cache_bytes(scores.cache),
        "evicted": num_evicted(scores.cache),
        "layers": layers,
    }


def print_table(report: dict[str, Any]) -> None:
    """The rows, for people."""
    count = report["rows"][0]["tokens"]
    table = Table(title=f"perplexity of {count:,} tokens, {report['config']['model']}, {report['device']['kind']}")
    for title in _TITLES:
        table.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*(form.format(row[name]) if name in row else "-" for name, form in _COLUMNS.items()))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


def main(settings: Settings) -> int:
    """Runs the program."""
    values = settings.flags
    for task in values["tasks"].value:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    for name, least in (("tokens", 1), ("rows", 1), ("prefix", 1)):
        check_between(f"--{name}", values[name].value, least, 1 << 30)
    if values["held_out_share"].value is None:  # the model in the tree was trained on all but the ends of its texts
        values["held_out_share"].value = 1.0 if values["text"].present else 0.02
    check_between("--held_out_share", values["held_out_share"].value, 1e-6, 1.0)
    if values["report"].value:
        check_target(values["report"].value)
    policies = [parse_policy(text) for text in dict.fromkeys(["full", *split_policies(values["policies"].value)])]
    report = new_report("kvjax.evaluate", config=settings.config.to_dict(), policy=values["policies"].value)
    report["flags"] = {name: values[name].value for name in _RECORDED}
    report["rows"] = []
    evaluate_perplexity(settings, policies, report)
    print_table(report)
    return 0


def define_flags(values: flags.FlagValues) -> None:
    """Defines the program's flags."""
    texts = "tinyshakespeare/input.txt", "moby-dick/2701.txt", "gsm8k/train.jsonl"
    default = ",".join(f"../shared/data/{name}" for name in texts)
    policies = "int8;turboquant(bits=4);int4;kivi(bits=4);turboquant(bits=2);kivi(bits=2)"
    flags.DEFINE_list("tasks", "ppl", f"What to measure: {', '.join(TASKS)}.", flag_values=values)
    flags.DEFINE_string("policies", policies, "Policies, separated by semicolons.", flag_values=values)
    flags.DEFINE_list("text", default, "Text files; the end of each is used.", flag_values=values)
    help = (
        "Share of each file, its end, that is used; 0.02 of the texts above, and all of yours, where it is not given."
    )
    flags.DEFINE_float("held_out_share", None, help, flag_values=values)
    flags.DEFINE_integer("tokens", 2000, "Tokens that are scored, in all rows together.", flag_values=values)
    flags.DEFINE_integer("rows", 4, "Rows of text, decoded together.", flag_values=values)
    flags.DEFINE_integer("prefix", 512, "Tokens of each row before the scored ones.", flag_values=values)
    flags.DEFINE_bool("speed", True, "Time decoding with each policy, too.", flag_values=values)
    flags.DEFINE_string("report", None, "JSON file for the record of the run.", flag_values=values)
    flags.DEFINE_bool("quiet", False, "No progress.", flag_values=values)


if __name__ == "__main__":
    sys.exit(run(main, usage=__doc__, define_flags=define_flags, default_config="configs/tiny_cpu.py"))
