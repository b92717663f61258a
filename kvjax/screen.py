"""What programs say between texts on standard output: lines that begin with dashes, coloured where a terminal is."""

from collections.abc import Sequence
from os.path import commonprefix

from rich.console import Console
from rich.text import Text

_BARS = "▁▂▃▄▅▆▇█"
_ENDS = " [...] "


def note(text: str, *, style: str = "bold") -> None:
    """Prints a line that is no part of a text."""
    _print(Text(f"--- {text}", style=style))


def show_beside(text: str, other: str) -> None:
    """Prints a text; on a terminal, what it has in common with another one is dim, and the rest is not."""
    same = len(commonprefix([text, other]))
    _print(Text.assemble((text[:same], "dim"), (text[same:], "red")))


def _print(text: Text) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        console.print(text)
    else:
        print(text.plain, flush=True)


def sparkline(numbers: Sequence[float], *, width: int = 60) -> str:
    """Numbers as bars in one line, the largest as the highest; more than fit are shown by the largest of neighbours."""
    count = min(len(numbers), width)
    edges = [len(numbers) * place // count for place in range(count + 1)] if count else [0]
    tops = [max(numbers[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    most = max(tops, default=0.0)
    if most <= 0:
        return _BARS[0] * count
    return "".join(_BARS[min(int(max(top, 0.0) / most * len(_BARS)), len(_BARS) - 1)] for top in tops)


def shorten(text: str, *, most: int = 1200) -> str:
    """A text without its middle where it is longer than that many characters."""
    if len(text) <= most:
        return text
    half = (most - len(_ENDS)) // 2
    return text[:half] + _ENDS + text[-half:]
