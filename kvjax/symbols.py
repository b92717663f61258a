"""Symbols: the words in which a small model's tasks are written, each one token of its tokenizer.

<10> ... <99>   keys: names of facts, nodes, variables         <0> ... <9>   digits, the values of passkeys and sums
[FACT] [ASK]    markers: what a statement or a question is
"""

import re
from collections.abc import Callable

import numpy as np

MARKERS = (
    *("[FACT]", "[PTR]", "[SET]", "[NUM]", "[NODE]", "[CPY]"),  # statements
    *("[ASK]", "[HOP]", "[GET]", "[SUM]", "[DFS]", "[OUT]"),  # questions
    *("[ANS]", "[END]"),  # answers
)
NUM_DIGITS = 10
NUM_SYMBOLS = 100
SYMBOLS = (*MARKERS, *(f"<{index}>" for index in range(NUM_SYMBOLS)))
"""All of them, in the order of their token ids."""

_ONE_TOKEN = re.compile(r"<\d{1,2}>|\[(?:" + "|".join(marker[1:-1] for marker in MARKERS) + r")\]|.", re.DOTALL)


def symbol(index: int) -> str:
    """A key or a digit as text."""
    return f"<{index}>"


def spell(*parts: str | int) -> str:
    """Markers, and numbers of symbols, as text: "[FACT]", 17, 5 gives "[FACT]<17><5>"."""
    return "".join(part if isinstance(part, str) else symbol(part) for part in parts)


def draw_keys(rng: np.random.Generator, count: int) -> list[int]:
    """Different keys, digits not among them."""
    return [int(key) for key in NUM_DIGITS + rng.permutation(NUM_SYMBOLS - NUM_DIGITS)[:count]]


def num_tokens(text: str) -> int:
    """Tokens of a text of ASCII letters and symbols: a symbol is one, any other character is one."""
    return len(_ONE_TOKEN.findall(text))


def scatter(
    pieces: list[str],
    num_filler: int,
    rng: np.random.Generator,
    filler: Callable[[np.random.Generator, int], str],
    *,
    depths: dict[int, float] | None = None,
) -> str:
    """Pieces in a row with filler between them, `num_filler` tokens in all.

    Args:
      pieces: texts, in the order in which they come where no depth is asked for.
      num_filler: tokens of filler, at least 0.
      rng: decides where the filler is cut.
      filler: see `Material`.
      depths: index of a piece -> how deep it lies among the filler, 0 (at the start) to 1.
    """
    cuts = np.sort(rng.integers(0, num_filler + 1, size=len(pieces)))
    for index, depth in (depths or {}).items():
        cuts[index] = round(depth * num_filler)
    text, found, last = filler(rng, num_filler), [], 0
    for index in np.argsort(cuts, kind="stable"):
        found += [text[last : cuts[index]], pieces[index]]
        last = cuts[index]
    return "".join([*found, text[last:]])
