"""Text that means nothing, to put between the facts of a task: sentences of a few hundred words, or pieces of books."""

import re
from collections.abc import Callable, Sequence

import numpy as np


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


_NAMES = _words("Ada Ben Clara Dora Emil Frida Georg Hanna Ivo Jana Karl Lena Max Nora Otto Paula Rosa Tom Una Viktor")
_THINGS = _words("""
    apple basket boat book bottle bridge candle chair clock coat cup door drum engine fence flag fork garden gate hammer
    hat house key kite ladder lamp letter map mill mirror needle oven paper pencil piano plate pond rope saddle shoe
    spoon stone table tent tower train tree violin wagon wall well wheel window
""")
_KINDS = _words("""
    big blue broken bright cheap clean cold dark dry empty fine green grey heavy hollow large light little long narrow
    new old pale plain quiet red round rusty sharp short slow small soft square strange thick tall warm white wide
    wooden yellow
""")
_DOES = _words(
    "built bought carried cleaned drew dropped found fixed hid kept left lent liked lost made moved painted sold"
)
_WHERE = _words("above behind below beside in near on under")
_WHEN = ("after breakfast", "at noon", "at night", "in spring", "last week", "long ago", "on Monday", "once", "twice")


def _sentence(rng: np.random.Generator) -> str:
    def one(words: Sequence[str]) -> str:
        return words[int(rng.integers(len(words)))]

    place = f"{one(_WHERE)} the {one(_KINDS)} {one(_THINGS)}"
    match int(rng.integers(4)):
        case 0:
            return f"{one(_NAMES)} {one(_DOES)} the {one(_KINDS)} {one(_THINGS)} {one(_WHEN)}. "
        case 1:
            return f"The {one(_THINGS)} {place} was {one(_KINDS)}. "
        case 2:
            return f"{one(_NAMES)} and {one(_NAMES)} {one(_DOES)} a {one(_THINGS)} {place}. "
        case _:
            return f"Nobody {one(_DOES)} the {one(_THINGS)} {one(_WHEN)}. "


def sentences(rng: np.random.Generator, num_characters: int) -> str:
    """Sentences of exactly that many ASCII characters, cut where they end."""
    pieces, length = [], 0
    while length < num_characters:
        pieces.append(_sentence(rng))
        length += len(pieces[-1])
    return "".join(pieces)[:num_characters]


def sentences_of_tokens(count: Callable[[str], int]) -> Callable[[np.random.Generator, int], str]:
    """(generator, n) -> whole sentences of at most n tokens, as a tokenizer counts them."""

    def take(rng: np.random.Generator, num_tokens: int) -> str:
        text, used = "", 0
        while True:
            sentence = _sentence(rng)
            used += count(sentence)
            if used > num_tokens:
                return text
            text += sentence

    return take


def excerpts(text: str) -> Callable[[np.random.Generator, int], str]:
    """(generator, n) -> n characters of a text from anywhere in it."""

    def take(rng: np.random.Generator, num_characters: int) -> str:
        start = int(rng.integers(0, max(len(text) - num_characters, 1)))
        return text[start : start + num_characters]

    return take
