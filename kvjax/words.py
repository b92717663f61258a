"""What tasks in words share: prompts with or without a chat template, names, needles among sentences, words found.

Tasks in symbols are in `kvjax/symbols.py`. Here the tokenizer is any, and `Material.count` says what a text takes.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from kvjax.errors import UserError
from kvjax.filler import KINDS, THINGS
from kvjax.task import Material, Task, check_fits

_SAMPLE, _TRIES = 32, 6
_SENTENCE = re.compile(r"[^.!?]*[.!?]+\s*|[^.!?]+$")


def prompt_of(material: Material, context: str, question: str, *, lead: str = "\nAnswer:") -> tuple[str, str]:
    """Context and question as a model wants them; joined, they are what it reads.

        chat      [ template: the user says | context ][ question | template: the assistant says ]
        no chat   [ context ][ question | lead ]

    Args:
      material: has the chat template or none.
      context: ends in white space or is empty.
      question: what the user says last.
      lead: what begins the answer where there is no chat template.

    Raises:
      UserError: the template writes other words than the user's.
    """
    if material.chat is None:
        return context, question + lead
    words = context + question
    said = words.strip()  # many templates take white space off both ends
    prompt = material.chat(words)
    start = prompt.rfind(said)
    if start < 0:
        raise UserError(
            "The model's chat template writes other words than the user's; run its tasks without the template."
        )
    cut = start + max(len(context) - (len(words) - len(words.lstrip())), 0)
    cut = min(cut, start + len(said))
    return prompt[:cut], prompt[cut:]


def count_prompt(material: Material, prompt: tuple[str, str]) -> int:
    """Tokens of context and question, read one after the other."""
    return sum(map(material.count, prompt))


def fitting_prompt(
    task: Task, material: Material, context: str, question: str, *, lead: str = "\nAnswer:"
) -> tuple[str, str]:
    """The same as `prompt_of`; raises `UserError` if it takes more than a task's tokens."""
    prompt = prompt_of(material, context, question, lead=lead)
    check_fits(task, count_prompt(material, prompt))
    return prompt


def longest_prompt(
    task: Task, material: Material, build: Callable[[int], tuple[str, str]], most: int
) -> tuple[int, tuple[str, str]]:
    """A prompt as long as a task's tokens have room for, give or take a piece.

    Args:
      task: its `tokens` bound context and question together.
      material: counts.
      build: number of pieces -> context and question.
      most: pieces that there are.

    Returns:
      The number of pieces, 0 to `most`, and the prompt.

    Raises:
      UserError: not even the prompt without pieces fits.
    """

    def size(pieces: int) -> int:
        return count_prompt(material, build(pieces))

    alone = size(0)
    check_fits(task, alone)
    # Pieces take about the same each, so a few counts find the number; texts of 100,000 tokens are slow to count.
    pieces, taken, guess, each = 0, alone, min(_SAMPLE, most), 1.0
    for _ in range(_TRIES):
        if guess == pieces:
            break
        pieces, taken = guess, size(guess)
        each = max((taken - alone) / pieces, 1.0) if pieces else each
        guess = min(max(pieces + math.floor((task.tokens - taken) / each), 0), most)
    while taken > task.tokens:
        pieces -= 1
        taken = size(pieces)
    return pieces, build(pieces)


def filler_sentences(rng: np.random.Generator, material: Material, num_tokens: int) -> list[str]:
    """Sentences of filler, more than fit into that many tokens; each ends in white space."""
    # Counted one by one, sentences seem longer than they are in a row.
    return [
        f"{piece.strip()} " for piece in _SENTENCE.findall(material.filler(rng, 3 * num_tokens // 2)) if piece.strip()
    ]


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of things, e.g. "rusty-violin"; three words each where two do not make enough.

    No name is part of another.

    Raises:
      UserError: more than 91,266 are wanted.
    """
    kinds, things = len(KINDS), len(THINGS)
    if count <= kinds * things:
        drawn = rng.choice(kinds * things, size=count, replace=False)
        return [f"{KINDS[one // things]}-{THINGS[one % things]}" for one in drawn]
    triples = kinds * (kinds - 1) * things
    if count > triples:
        raise UserError(f"There are {triples} names for things, and {count} are wanted: ask for fewer tokens.")
    names = []
    for one in rng.choice(triples, size=count, replace=False):
        pair, thing = divmod(int(one), things)
        first, second = divmod(pair, kinds - 1)
        second += second >= first
        names.append(f"{KINDS[first]}-{KINDS[second]}-{THINGS[thing]}")
    return names


def weave(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> str:
    """Sentences with needles between them, each at its depth among the sentences, 0 (first) to 1 (last)."""
    cuts = [round(depth * len(sentences)) for depth in depths]
    pieces, last = [], 0
    for index in np.argsort(cuts, kind="stable"):
        pieces += [*sentences[last : cuts[index]], needles[index]]
        last = cuts[index]
    return "".join([*pieces, *sentences[last:]])


def share_found(output: str, expected: Iterable[str]) -> float:
    """Share of the expected words or numbers that stand in an output, whatever their case.

    RULER's "string match all" (arXiv 2404.06654, scorer of its needle, tracking and counting tasks), but a word inside
    a longer word and a number inside a longer number do not count.
    """
    text = output.casefold()
    found = [re.search(rf"(?<![\w-]){re.escape(word.casefold())}(?![\w-])", text) is not None for word in expected]
    return sum(found) / len(found)
