"""How all pictures look: two themes, one colour and marker a method, one size, the same bytes for the same numbers.

Figures are as wide as a column of text on a page of a repository, so that 9 points are 9 points there. Their
background is transparent; `light` and `dark` differ in ink alone.
"""

import dataclasses
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvjax.pictures.names import Names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 8.3
"""Inches of every figure; 797 pixels on a page."""
SMALL, LARGE = 9.0, 10.0
"""Points of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Inks for one background.

    Attributes:
      text: words that matter.
      muted: axes and remarks.
      line: of grids.
      faint: areas in which there is nothing.
      hues: of methods, told apart by people who see no red or no green; every hue has a marker of its own, too.
      ramp: from 0 to 1.
    """

    text: str
    muted: str
    line: str
    faint: str
    hues: tuple[str, ...]
    ramp: tuple[str, ...]


THEMES: Mapping[str, Theme] = {
    "light": Theme(
        text="#1f2328",
        muted="#59636e",
        line="#d1d9e0",
        faint="#e6eaef",
        hues=("#0072b2", "#d55e00", "#009e73", "#c4569a", "#bd8600", "#42a5e0", "#7a1f57", "#6f7316"),
        ramp=("#eef1f4", "#8fc1e3", "#0072b2", "#00436b"),
    ),
    "dark": Theme(
        text="#f0f6fc",
        muted="#9198a1",
        line="#30363d",
        faint="#262c36",
        hues=("#3f9fe0", "#f0762b", "#1fc796", "#ee9ccb", "#f2b632", "#9bd8ff", "#c0609c", "#b5ba4e"),
        ramp=("#1b222b", "#1c4a6e", "#2f8fd0", "#a5d8ff"),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """How a method is drawn.

    Attributes:
      hue: index into a theme's hues; None for its text colour, or for `muted`.
      marker: matplotlib's name of it.
      hollow: outline alone.
      muted: in the colour of remarks.
    """

    hue: int | None = None
    marker: str = "o"
    hollow: bool = False
    muted: bool = False

    def colour(self, theme: Theme) -> str:
        """Its colour in a theme."""
        if self.hue is not None:
            return theme.hues[self.hue]
        return theme.muted if self.muted else theme.text


NEUTRAL: Mapping[str, Style] = {
    "full": Style(marker="*"),
    "oracle": Style(marker="D", hollow=True),
    "random": Style(marker="x", muted=True),
    "streaming": Style(marker="+", muted=True),
}
"""What others are compared with."""

_USUAL = {"triattention": 0, "h2o": 1, "snapkv": 2, "keydiff": 3, "int4": 4, "int8": 5, "kivi": 6, "turboquant": 7}
_MARKERS = ("o", "s", "^", "v", "P", "X", "p", "d")


def styles_of(names: Names) -> dict[str, Style]:
    """A style for each family of policies, in their order; well-known methods have the same one in every run.

    Families of one method share its hue; the first of them is filled.
    """
    count = len(_MARKERS)
    methods = [one for one in dict.fromkeys(names.methods.values()) if one not in NEUTRAL]
    numbers = _numbers(methods)
    found, seen = {}, dict.fromkeys(methods, 0)
    for family, method in names.methods.items():
        if method in NEUTRAL:
            found[family] = NEUTRAL[method]
            continue
        number = numbers[method]
        marker = _MARKERS[(number + 3 * (number // count) + seen[method]) % count]
        found[family] = Style(hue=number % count, marker=marker, hollow=seen[method] > 0)
        seen[method] += 1
    return found


def _numbers(methods: Sequence[str]) -> dict[str, int]:
    """A number for each method: the usual ones have theirs, the others get what is free, and then go round again."""
    usual = {method: _USUAL[method] for method in methods if method in _USUAL}
    free = [number for number in range(len(_MARKERS)) if number not in usual.values()]
    others = [method for method in methods if method not in usual]
    return usual | dict(zip(others, itertools.chain(free, itertools.count(len(_MARKERS))), strict=False))


def render(make: Callable[[Theme], "Figure"], theme: Theme, *, title: str) -> str:
    """A picture as SVG, nothing of a user's matplotlib settings in it; the same text for the same numbers.

    Args:
      make: draws it.
      theme: its inks.
      title: for whoever cannot see it.
    """
    buffer = io.StringIO()
    draw(make, theme, buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return buffer.getvalue()


def draw(make: Callable[[Theme], "Figure"], theme: Theme, target: Any, **how: Any) -> None:
    """Draws and saves a figure in a theme; `how` as for `Figure.savefig`."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_settings(theme))
        make(theme).savefig(target, **how)


def _settings(theme: Theme) -> dict[str, Any]:
    """For matplotlib."""
    return {
        "svg.hashsalt": "kvjax",
        "font.family": "DejaVu Sans",
        "font.size": SMALL,
        "axes.titlesize": LARGE,
        "axes.labelsize": SMALL,
        "xtick.labelsize": SMALL,
        "ytick.labelsize": SMALL,
        "legend.fontsize": SMALL,
        "figure.titlesize": LARGE,
        "figure.labelsize": SMALL,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": theme.text,
        "axes.titlecolor": theme.text,
        "axes.labelcolor": theme.muted,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.line,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "axes.axisbelow": True,
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }


def panels(count: int, columns: int, *, height: float, extra: float = 0.0, **how: Any) -> tuple["Figure", list[Any]]:
    """A figure with a grid of axes, row by row; those left over are hidden.

    Args:
      count: panels wanted.
      columns: side by side, at most.
      height: inches of a row.
      extra: inches for what stands around the grid.
      how: as for `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, rows * height + extra), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **how).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def below(figure: "Figure", handles: Sequence[Any], *, columns: int, remark: str = "") -> None:
    """A legend under the grid, with a remark above it."""
    legend = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        handletextpad=0.5,
        columnspacing=1.6,
        title=remark or None,
        title_fontsize=SMALL,
    )
    legend.get_title().set_color(figure.axes[0].xaxis.label.get_color())
