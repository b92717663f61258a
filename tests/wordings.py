"""What problems in words are made of in tests, and examples of their tasks."""

import dataclasses
import re

from kvjax.filler import sentences_of_tokens
from kvjax.task import Material, example_of


def num_words(text):
    """Words and signs, as a tokenizer of words counts them."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def chat(words):
    """A chat template that takes white space off both ends, as many do."""
    return f"<user> {words.strip()} <assistant> "


MATERIAL = Material(filler=sentences_of_tokens(num_words), count=num_words)
CHAT = dataclasses.replace(MATERIAL, chat=chat)


def some_examples(task, *, material=MATERIAL, count=5, seed=3):
    """Examples of a task."""
    return [example_of(task, material, seed=seed, index=index) for index in range(count)]


def size(example):
    """Tokens of context and question."""
    return num_words(example.context) + num_words(example.question)
