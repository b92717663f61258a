"""Accuracy against bytes: a panel a task, every policy a point, and a line along the best at each size.

Text that is scored by likelihood has its divergence from the uncompressed cache, KL, in place of accuracy.
"""

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import isotonic_regression

from kvjax.pictures.names import Names, names_of
from kvjax.pictures.style import WIDTH, Style, Theme, below, panels, styles_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 2.15  # inches of a panel with its titles
_GAP = 8.0  # pixels between points at the same bytes
_LEAST_KL = 1e-6
_FADED = 0.45
_REACH = 0.04  # of a marker, in heights of a panel
_FRONT = {"drawstyle": "steps-post", "linewidth": 4.5, "alpha": 0.22, "solid_joinstyle": "miter"}


@dataclasses.dataclass(frozen=True)
class Point:
    """A policy in a panel.

    Attributes:
      policy: its string.
      share: bytes of its cache over those of the uncompressed one.
      value: accuracy, or KL in nats.
      low: end of the interval; `value` where there is none.
      high: the other end.
      note: why it says nothing about methods, or nothing.
    """

    policy: str
    share: float
    value: float
    low: float
    high: float
    note: str = ""


def points_of(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """The points of one task in one regime.

    Args:
      rows: of that task, with notes; those without bytes or a value are left out.
    """
    whole = next((row["cache_bytes"] for row in rows if row["policy"] == "full"), rows[0]["full_cache_bytes"])
    found = []
    for row in rows:
        scored = "accuracy" in row
        value = row["accuracy"] if scored else row["kl_mean"]
        if not (scored or value > 0):
            continue
        ends = (row["accuracy_low"], row["accuracy_high"]) if scored else (value, value)
        value, low, high = (one if scored else max(one, _LEAST_KL) for one in (value, *ends))
        found.append(Point(row["policy"], row["cache_bytes"] / whole, value, low, high, row.get("note") or ""))
    return found


def front(points: Sequence[Point], *, higher: bool = True) -> list[Point]:
    """The points that no other one beats at the same bytes or fewer, from the smallest on; without oracles.

    Args:
      points: of a panel; those with a note are left out.
      higher: whether higher values are better.
    """
    sign = 1 if higher else -1
    able = [point for point in points if not point.note and not point.policy.startswith("oracle(")]
    found: list[Point] = []
    for point in sorted(able, key=lambda point: (point.share, -sign * point.value)):
        if not found or sign * point.value > sign * found[-1].value:
            found.append(point)
    return found


def side_by_side(places: Sequence[float], gap: float) -> list[float]:
    """Places moved as little as can be so that neighbours are `gap` apart, in the same order."""
    order = np.argsort(np.asarray(places, np.float64), kind="stable")
    steps = gap * np.arange(len(order))
    moved = np.empty(len(order))
    moved[order] = isotonic_regression(np.asarray(places, np.float64)[order] - steps).x + steps if len(order) else ()
    return moved.tolist()


def bands(extents: Sequence[tuple[float, float]]) -> list[list[int]]:
    """Numbers of extents (low, high) that overlap, directly or through others, together."""
    found: list[list[int]] = []
    top = -math.inf
    for index in sorted(range(len(extents)), key=lambda index: extents[index][0]):
        low, high = extents[index]
        if low <= top:
            found[-1].append(index)
        else:
            found.append([index])
        top = max(top, high)
    return found


def halvings(smallest: float, most: int) -> list[float]:
    """At most so many shares to write on the axis: 1 and powers of two, none below the smallest but 1/2."""
    last = max(math.floor(-math.log2(smallest)), 1)
    step = -(-last // (most - 1))
    return [2.0**-power for power in range(0, last + 1, step)]


def log_ticks(values: Sequence[float]) -> list[float]:
    """Ones and threes of the decades around values, from the last below all to the first above all."""
    lowest, highest = min(values), max(values)
    powers = range(math.floor(math.log10(lowest)) - 1, math.ceil(math.log10(highest)) + 2)
    marks = [float(f"{digit}e{power}") for power in powers for digit in (1, 3)]
    start = max(mark for mark in marks if mark <= lowest)
    end = min(mark for mark in marks if mark >= highest)
    return [mark for mark in marks if start <= mark <= end]


def heading(rows: Sequence[dict[str, Any]], *, width: int) -> tuple[str, str]:
    """Title and remark of a panel, in lines of `width` letters.

    Args:
      rows: of one task in one regime, with notes.
      width: letters of a line.
    """
    first = rows[0]
    words = [f"{first['examples']} examples"]
    if first["question"] != "inside":
        words.append("question after compression")
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    own = [row["note"] for row in rows if row["policy"] == "full" and row.get("note")]
    words += [f"grey says nothing: {note.split(':')[0]}" for note in (own or notes)[:1]]
    task = first["task"] if len(first["task"]) <= width else f"{first['task'][: width - 1]}…"
    return task, textwrap.fill("; ".join(words), width + 4)


def accuracy_figure(rows: Sequence[dict[str, Any]], theme: Theme) -> "Figure":
    """Draws the picture.

    Args:
      rows: of a report, with notes (`kvjax.results.mark`).
      theme: inks.
    """
    cells = list(dict.fromkeys((row["task"], row["question"]) for row in rows))
    groups = [[row for row in rows if (row["task"], row["question"]) == cell] for cell in cells]
    names = names_of([row["policy"] for row in rows])
    styles = styles_of(names)
    columns = min(len(groups), 2 if len(groups) in (2, 4) else 3)
    width = (80, 80, 46, 30)[columns]
    lines = max(heading(group, width=width)[1].count("\n") for group in groups)
    across = min(len(styles) + 1, 4)
    extra = 0.45 + 0.2 * -(-(len(styles) + 1) // across)
    figure, axes = panels(len(groups), columns, height=_HEIGHT + 0.16 * lines, extra=extra, sharex=True)
    smallest = min((point.share for group in groups for point in points_of(group)), default=0.5)
    ticks = halvings(smallest, 5 if columns > 2 else 8)
    limits = min(ticks[-1], smallest) * 0.7, 1.45
    gap = _GAP * math.log2(limits[1] / limits[0]) / (WIDTH * 96 * 0.85 / columns)
    for place, (axis, group) in enumerate(zip(axes, groups, strict=True)):
        points = points_of(group)
        _set_titles(axis, group, theme, width=width, lines=lines + 1)
        axis.set_xscale("log", base=2)
        axis.set_xlim(*limits)
        axis.set_xticks(ticks, ["1" if tick == 1 else f"1/{round(1 / tick)}" for tick in ticks])
        axis.minorticks_off()
        last = place + columns >= len(groups)
        axis.tick_params(labelbottom=last)
        axis.set_xlabel(f"← better   bytes{' of the cache' * (columns < 3)}, share of full's" if last else "")
        _set_values(axis, points, scored="accuracy" in group[0], first=place % columns == 0)
        _draw_points(axis, points, names, styles, theme, gap=gap, higher="accuracy" in group[0])
    remark = "Policies at about the same bytes stand side by side."
    remark += f" All but full: {names.common}." if names.common else ""
    below(figure, _legend(styles, theme), columns=across, remark=remark)
    return figure


def _set_titles(axis: Any, rows: Sequence[dict[str, Any]], theme: Theme, *, width: int, lines: int) -> None:
    """Title and remark of a panel, with room for `lines` of remark."""
    title, remark = heading(rows, width=width)
    room = 12 * lines + 2
    axis.set_title(title, pad=room + 4)
    how = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
    axis.annotate(remark, (0, 1), (0, room), color=theme.muted, **how)
    axis.grid(True, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _set_values(axis: Any, points: Sequence[Point], *, scored: bool, first: bool) -> None:
    """The scale of values."""
    if scored:
        axis.set_ylim(-0.04, 1.04)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axis.set_ylabel("accuracy, %" if first else "")
        return
    axis.set_yscale("log")
    axis.set_ylabel("KL to full, nats\n← better")
    if points:
        ticks = log_ticks([point.value for point in points])
        axis.set_ylim(ticks[0] * 0.8, ticks[-1] * 1.25)
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.tick_params(axis="y", which="minor", left=False, labelleft=False)


def places_of(points: Sequence[Point], extents: Sequence[tuple[float, float]], gap: float) -> dict[str, float]:
    """Where each policy stands on the axis of shares: where its bytes are, or beside others there.

    Args:
      points: of a panel.
      extents: what each covers from below to above.
      gap: in doublings, between points that would hide each other.
    """
    found = {}
    for band in bands(extents):
        ordered = sorted((points[index] for index in band), key=lambda point: (point.share, point.value))
        moved = side_by_side([math.log2(point.share) for point in ordered], gap)
        found |= {point.policy: 2.0**place for point, place in zip(ordered, moved, strict=True)}
    return found


def _extents(axis: Any, points: Sequence[Point]) -> list[tuple[float, float]]:
    """What intervals and markers cover, in heights of the panel."""
    scale = axis.transData - axis.transAxes
    ends = [[scale.transform((1.0, end))[1] for end in (one.low, one.value, one.high)] for one in points]
    return [(min(low, value - _REACH), max(high, value + _REACH)) for low, value, high in ends]


def _draw_points(
    axis: Any,
    points: Sequence[Point],
    names: Names,
    styles: dict[str, Style],
    theme: Theme,
    *,
    gap: float,
    higher: bool,
) -> None:
    """Points with their intervals, lines along families, and the front."""
    places = places_of(points, _extents(axis, points), gap)
    best = front(points, higher=higher)
    if best:
        x = np.maximum.accumulate([places[point.policy] for point in best]).tolist()
        y = [point.value for point in best]
        axis.plot([*x, axis.get_xlim()[1]], [*y, y[-1]], color=theme.text, zorder=2, **_FRONT)
    for family, style in styles.items():
        own = sorted((one for one in points if names.families[one.policy] == family), key=lambda one: one.share)
        clear = [point for point in own if not point.note]
        colour = style.colour(theme)
        x, y = [places[point.policy] for point in clear], [point.value for point in clear]
        axis.plot(x, y, color=colour, linewidth=0.9, alpha=0.5, zorder=2.5)
        for point in own:
            faded = {"alpha": _FADED, "color": theme.muted} if point.note else {"color": colour}
            here = places[point.policy]
            axis.plot([here, here], [point.low, point.high], linewidth=1, solid_capstyle="butt", zorder=3, **faded)
            axis.plot([here], [point.value], **_marker(style), **faded, zorder=4, linestyle="none")


def _marker(style: Style) -> dict[str, Any]:
    """Arguments of matplotlib's lines."""
    size = {"*": 9.5, "x": 6.0, "+": 7.5, "P": 6.5, "X": 6.5}.get(style.marker, 5.5)
    face = {"markerfacecolor": "none"} if style.hollow else {}
    return {"marker": style.marker, "markersize": size, "markeredgewidth": 1.4 if style.marker in "x+" else 1.1, **face}


def _legend(styles: dict[str, Style], theme: Theme) -> list[Any]:
    """An entry for each family, and for the front."""
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=style.colour(theme), linestyle="none", label=family, **_marker(style))
        for family, style in styles.items()
    ]
    return [*entries, Line2D([], [], color=theme.text, label="best at these bytes", **_FRONT)]
