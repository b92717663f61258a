"""Heat maps of a hidden fact: accuracy by its depth and by the length of the text, a panel a policy."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kvjax.pictures.names import fold, names_of
from kvjax.pictures.style import SMALL, Theme, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTHS = 5
"""Bins of depth."""


def kinds_of(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of tasks whose examples have a depth and a length, of two lengths or more, by kind of task and regime.

    A kind is a task without its length and depth: `needle(facts=8)`.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if {"depth", "tokens"} <= row.get("facts", {}).keys() and "scores" in row:
            found.setdefault((_kind(row["task"]), row["question"]), []).append(row)
    return {key: group for key, group in found.items() if len(set(map(length_of, group))) > 1}


def length_of(row: dict[str, Any]) -> int:
    """Tokens that a task was to have; what its examples have on average where its name does not say."""
    named = re.search(r"[(,]\s*tokens\s*=\s*(\d+)", row["task"])
    return int(named[1]) if named else round(float(np.median(row["facts"]["tokens"])))


def _kind(task: str) -> str:
    name, _, inside = task.removesuffix(")").partition("(")
    kept = [one for one in inside.split(",") if one and not re.match(r"\s*(tokens|depth)\s*=", one)]
    return f"{name}({','.join(kept)})" if kept else name


def grid_of(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean score and number of examples of one policy, `DEPTHS lengths` both; the mean of no examples is -1.

    Args:
      rows: of that policy.
      lengths: columns.
    """
    total, count = np.zeros((DEPTHS, len(lengths))), np.zeros((DEPTHS, len(lengths)), np.int64)
    for row in rows:
        column = lengths.index(length_of(row))
        for depth, score in zip(row["facts"]["depth"], row["scores"], strict=True):
            place = min(int(depth * DEPTHS), DEPTHS - 1), column
            total[place] += score
            count[place] += 1
    return np.where(count > 0, total / np.maximum(count, 1), -1.0), count


def columns_for(lengths: int, policies: int) -> int:
    """Panels side by side, so that numbers and names can be read."""
    return max(1, min(4, policies, 700 // (34 * lengths + 20)))


def needle_figure(rows: Sequence[dict[str, Any]], theme: Theme) -> "Figure":
    """Draws the picture.

    Args:
      rows: of one kind of task in one regime; see `kinds_of`.
      theme: inks.
    """
    names = names_of([row["policy"] for row in rows])
    lengths = sorted(set(map(length_of, rows)))
    columns = columns_for(len(lengths), len(names.short))
    lines = {policy: fold(name, 96 // columns) for policy, name in names.short.items()}
    height = 1.35 + 0.16 * max(text.count("\n") for text in lines.values())
    figure, axes = panels(len(lines), columns, height=height, extra=0.75, sharex=True, sharey=True)
    counts = []
    for place, (axis, (policy, title)) in enumerate(zip(axes, lines.items(), strict=True)):
        mean, count = grid_of([row for row in rows if row["policy"] == policy], lengths)
        counts.append(count)
        _draw(axis, mean, theme)
        axis.set_title(title, fontsize=SMALL)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks([0, (DEPTHS - 1) / 2, DEPTHS - 1], ["start", "middle", "end"])
        axis.tick_params(length=0, labelbottom=place + columns >= len(lines))
    seen = np.concatenate(counts)
    seen = seen[seen > 0]
    each = f"{seen.min()}" if seen.min() == seen.max() else f"{seen.min()} to {seen.max()}"
    place = "" if rows[0]["question"] == "inside" else ", question after compression"
    figure.suptitle(f"{_kind(rows[0]['task'])}{place}: right answers, %", x=0.01, ha="left")
    remark = f"{each} examples a field." + (f" All but full: {names.common}." if names.common else "")
    figure.supxlabel(f"tokens of the text\n{remark}", fontsize=SMALL, color=theme.muted)
    figure.supylabel("where the fact is", fontsize=SMALL, color=theme.muted)
    return figure


def _draw(axis: Any, mean: np.ndarray, theme: Theme) -> None:
    """Fields with their numbers; nothing where there are no examples."""
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    axis.set_xlim(-0.5, mean.shape[1] - 0.5)
    axis.set_ylim(mean.shape[0] - 0.5, -0.5)
    axis.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(mean):
        if value >= 0:
            colour = ramp(float(value))
            axis.add_patch(_field(column, row, colour))
            axis.text(column, row, f"{100 * value:.0f}", ha="center", va="center_baseline", color=ink_on(colour))


def _field(column: int, row: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=colour, edgecolor="none")


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever reads better on a colour (red, green, blue, from 0 to 1)."""
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in colour[:3]]
    light = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return "#111417" if (light + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
