"""Problems in symbols, read as a person reads them: without the code that wrote them."""

import re

from kvjax.filler import sentences
from kvjax.symbols import num_tokens
from kvjax.task import Material, example_of

MATERIAL = Material(filler=sentences, count=num_tokens)


def numbers(text):
    """The numbers of a text's symbols, in order."""
    return [int(number) for number in re.findall(r"<(\d+)>", text)]


def statements(text, marker):
    """The numbers right behind each occurrence of a marker."""
    return [numbers(run) for run in re.findall(re.escape(marker) + r"((?:<\d+>)*)", text)]


def asked(question, marker, *, end=""):
    """The numbers that a question asks for, which are its last ones."""
    (keys,) = statements(question, marker)
    assert question.endswith(marker + "".join(f"<{key}>" for key in keys) + end)
    return keys


def said(parts):
    """Numbers and markers as an answer."""
    return "".join(part if isinstance(part, str) else f"<{part}>" for part in parts) + "[END]"


def filler_of(text):
    """A text without its symbols and markers."""
    return re.sub(r"<\d+>|\[[A-Z]+\]", "", text)


def some_examples(task, *, count=20, seed=3):
    """Examples of a task."""
    return [example_of(task, MATERIAL, seed=seed, index=index) for index in range(count)]


def check_answers(examples, answer_of):
    """Each question has the answer that a reader of the context finds."""
    assert examples
    for example in examples:
        for question, answer in [(example.question, example.answer), *example.more]:
            assert answer == answer_of(example.context, question)
