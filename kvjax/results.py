"""Tables of policies on tasks: intervals, cells that say nothing about methods, and text for a terminal or a README."""

import math
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from kvjax.companions import frame_of, oracle_at
from kvjax.grammar import parse_policy

_REFUSED = "Refused"
_LEAST_FULL = 0.95
_LEAST_ORACLE = 0.9  # of full
_MOST_RANDOM = 0.95  # of full
_NOT_CUT = 1 << 12  # columns

TASK_COLUMNS = {
    "policy": "policy",
    "times smaller": "ratio_to_dtype",
    "accuracy": "accuracy",
    "95 % interval": "interval",
    "agreement": "agreement",
    "KL": "kl_mean",
    "tokens/s": "tokens_per_second",
    "": "note",
}
TEXT_COLUMNS = {
    "policy": "policy",
    "key bits": "key_bits",
    "value bits": "value_bits",
    "times smaller": "ratio_to_dtype",
    "perplexity": "perplexity",
    "change": "perplexity_change",
    "KL": "kl_mean",
    "KL p99.9": "kl_p999",
    "top-1": "top1_agreement",
    "tokens/s": "tokens_per_second",
}
_FORMS = {
    "policy": "{}",
    "note": "{}",
    "interval": "{}",
    "key_bits": "{:.3f}",
    "value_bits": "{:.3f}",
    "ratio_to_dtype": "{:.2f}",
    "accuracy": "{:.1%}",
    "agreement": "{:.1%}",
    "perplexity": "{:.4f}",
    "perplexity_change": "{:+.3%}",
    "kl_mean": "{:.5f}",
    "kl_p999": "{:.3f}",
    "top1_agreement": "{:.2%}",
    "tokens_per_second": "{:,.0f}",
}


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean of scores between 0 and 1: Wilson's for right and wrong, Student's otherwise."""
    count, mean = len(scores), float(np.mean(scores))
    if set(scores) <= {0.0, 1.0}:
        found = stats.binomtest(round(mean * count), count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    if count == 1:
        return 0.0, 1.0
    half = float(stats.t.ppf(0.975, count - 1)) * float(np.std(scores, ddof=1)) / math.sqrt(count)
    return max(mean - half, 0.0), min(mean + half, 1.0)


def mark(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `note`: why a cell says nothing about methods, or nothing.

    Where the whole cache fails nobody can do well; where random eviction does as well as it, nobody can fail.
    """
    accuracy = {(row["task"], row["question"], row["policy"]): row.get("accuracy") for row in rows}

    def note(row: dict[str, Any]) -> str:
        cell = row["task"], row["question"]
        full = accuracy.get((*cell, "full"))
        if full is None or row["policy"] == "full":
            return "" if full is None or full >= _LEAST_FULL else f"full below {_LEAST_FULL}: says nothing"
        if full < _LEAST_FULL:
            return f"full {full:.3f}: says nothing"
        frame = row["policy"].removeprefix("oracle") if row["policy"].startswith("oracle(") else None
        frame = frame or frame_of(parse_policy(row["policy"]))
        if frame is None:  # nothing is evicted
            return ""
        oracle = accuracy.get((*cell, oracle_at(frame)))
        if oracle is not None and oracle < _LEAST_ORACLE * full:
            return f"oracle {oracle:.3f}: says nothing"
        random = accuracy.get((*cell, f"random{frame}"))
        if random is not None and random > _MOST_RANDOM * full:
            return f"random {random:.3f}: says nothing"
        return ""

    return [{**row, "note": note(row)} for row in rows]


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A title, column titles and cells as text: all tasks in one, if there are several; then each task and regime."""
    marked = mark(rows)
    found = _summary(marked)
    for cell in dict.fromkeys((row["task"], row["question"]) for row in marked):
        own = [row for row in marked if (row["task"], row["question"]) == cell]
        scored = "accuracy" in own[0]
        columns = TASK_COLUMNS if scored else TEXT_COLUMNS
        place = f", question {cell[1]}" if scored else ""
        title = f"{cell[0]}{place}: {own[0]['examples']} examples, {own[0]['max_tokens']} tokens of room"
        found.append((title, list(columns), [[_text(row, name) for name in columns.values()] for row in own]))
    return found


def _summary(marked: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Accuracies of policies on tasks; no table for a single cell."""
    scored = [row for row in marked if "accuracy" in row]
    cells = list(dict.fromkeys((row["task"], row["question"]) for row in scored))
    if len(cells) < 2:
        return []
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in scored):
        own = {(row["task"], row["question"]): row for row in scored if row["policy"] == policy}
        ratios = sorted(row["ratio_to_dtype"] for row in own.values())
        ends = dict.fromkeys(f"{ratio:.1f}" for ratio in (ratios[0], ratios[-1]))
        lines.append([policy, " to ".join(ends), *(_percent(own.get(cell)) for cell in cells)])
    names = [task if question == "inside" else f"{task}, {question}" for task, question in cells]
    counts = dict.fromkeys(f"{count}" for count in sorted(row["examples"] for row in scored))
    title = f"Accuracy, {' or '.join(counts)} examples; in brackets where a cell says nothing about methods"
    return [(title, ["policy", "times smaller", *names], lines)]


def _percent(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    text = _text(row, "accuracy")
    return f"({text})" if row["note"] else text


def _text(row: dict[str, Any], name: str) -> str:
    if name == "interval":
        return f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}"
    return _FORMS[name].format(row[name]) if row.get(name) is not None else "-"


def make_console() -> Console:
    """A console for tables: as wide as the terminal, and what goes elsewhere is not cut."""
    return Console(width=None if sys.stdout.isatty() else _NOT_CUT)


def terminal_tables(rows: list[dict[str, Any]], refused: Mapping[str, str] = MappingProxyType({})) -> list[Table]:
    """The tables for a terminal, and that of refused combinations with the reasons."""
    found = []
    for title, columns, cells in tables(rows):
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column in ("policy", "") else "right", no_wrap=True)
        for row in cells:
            table.add_row(*row)
        found.append(table)
    if refused:
        table = Table("policy", "why", title=_REFUSED, title_justify="left")
        for policy, reason in refused.items():
            table.add_row(policy, reason)
        found.append(table)
    return found


def markdown_tables(rows: list[dict[str, Any]], refused: Mapping[str, str] = MappingProxyType({})) -> str:
    """The tables for a page, and that of refused combinations with the reasons."""
    blocks = []
    for title, columns, cells in tables(rows):
        lines = [f"### {title}", "", f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
        lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in cells]
        blocks.append("\n".join(lines))
    if refused:
        lines = [f"### {_REFUSED}", "", "| policy | why |", "| --- | --- |"]
        blocks.append("\n".join([*lines, *(f"| `{policy}` | {reason} |" for policy, reason in refused.items())]))
    return "\n\n".join(blocks) + "\n"
