"""A progress line on a terminal, and nothing where there is none."""

import sys
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts what is done on standard error; silent with `quiet` or without a terminal.

    Args:
      title: what is going on.
      unit: what is counted.
      total: how many there are, if that is known.
      quiet: show nothing.
    """

    def __init__(self, title: str, *, unit: str, total: int | None = None, quiet: bool = False):
        console = Console(file=sys.stderr)
        columns = (TextColumn(f"{title}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
        self._bar = Bar(*columns, console=console, disable=quiet or not console.is_terminal)
        self._task = self._bar.add_task(title, total=total)

    def advance(self, count: int) -> None:
        """Adds to what is done."""
        self._bar.advance(self._task, count)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def status(text: str, *, quiet: bool = False) -> AbstractContextManager[object]:
    """Says on a terminal what is going on, until the block ends.

    Args:
      text: e.g. "loading Qwen/Qwen3-8B".
      quiet: show nothing.
    """
    console = Console(file=sys.stderr)
    return nullcontext() if quiet or not console.is_terminal else console.status(text)
