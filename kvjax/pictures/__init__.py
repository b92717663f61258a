"""Pictures of an evaluation, each in light and in dark; `python -m kvjax.pictures DIR` draws them again from its files.

accuracy     accuracy against bytes, a panel a task
needle ...   accuracy by depth and length, a panel a policy; one for each kind of task that has both
kept         kept positions by layer and head over time, of one example
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvjax.errors import UserError
from kvjax.pictures.accuracy import accuracy_figure
from kvjax.pictures.kept import kept_figure
from kvjax.pictures.needle import kinds_of, needle_figure
from kvjax.pictures.style import THEMES, Theme, render
from kvjax.report import write_text
from kvjax.results import mark
from kvjax.tracing import Trace, trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER, TRACE = "pictures", "kept.json"
"""Where pictures are in the folder of an evaluation, and the trace among them."""


def draw_pictures(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws all pictures that rows and the trace allow.

    Args:
      folder: of an evaluation.
      rows: of its report.

    Returns:
      The files, in `folder/pictures`.

    Raises:
      UserError: the trace is no trace.
    """
    target = folder / FOLDER
    pictures: dict[str, tuple[str, Callable[[Theme], Figure]]] = {}
    marked = mark(list(rows))
    if marked:
        pictures["accuracy"] = "Accuracy against bytes", lambda theme: accuracy_figure(marked, theme)
    for (kind, question), group in kinds_of(marked).items():
        name = kind if question == "inside" else f"{kind}_{question}"
        pictures[_file_name(name)] = (
            f"{kind}: accuracy by depth and length",
            lambda theme, group=group: needle_figure(group, theme),
        )
    trace = read_trace(folder)
    if trace is not None:
        pictures["kept"] = "Kept positions by layer and head over time", lambda theme: kept_figure(trace, theme)
    paths = []
    for name, (title, make) in pictures.items():
        for shade, theme in THEMES.items():
            paths.append(target / f"{name}.{shade}.svg")
            write_text(paths[-1], render(make, theme, title=title))
    return paths


def read_trace(folder: Path) -> Trace | None:
    """The trace in the folder of an evaluation, if there is one.

    Raises:
      UserError: the file is no trace.
    """
    path = folder / FOLDER / TRACE
    if not path.exists():
        return None
    try:
        return trace_of(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is no trace of kept positions; remove it.") from error


def write_trace(folder: Path, trace: Trace) -> None:
    """Writes the trace into the folder of an evaluation."""
    write_text(folder / FOLDER / TRACE, json.dumps(trace.record(), separators=(",", ":")) + "\n")


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name).strip("_")
