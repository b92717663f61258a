"""Pieces of text that nobody generates."""

import re

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example, Material, example_of
from kvjax.tasks.ppl import Ppl


def letters(count):
    return Material(filler=lambda rng, length: "", count=count)


@pytest.fixture
def texts(tmp_path):
    """Two files of numbered words; each end is the last tenth."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{index:03d}" for index in range(200)) + "\n")
    return f"{tmp_path / 'a.txt'}:{tmp_path / 'b.txt'}"


def test_pieces_come_from_the_ends_of_all_files(texts):
    task = Ppl(tokens=10, scored=10, file=texts, held_out=0.1)
    pieces = [example_of(task, letters(len), seed=0, index=index) for index in range(60)]
    assert {len(piece.context) for piece in pieces} == {20}
    found = {word for piece in pieces for word in re.findall(r"\b[ab]\d{3}\b", piece.context)}
    assert {word[0] for word in found} == {"a", "b"}
    assert min(int(word[1:]) for word in found) == 180
    assert {(piece.question, piece.answer) for piece in pieces} == {("", "")}


def test_pieces_hold_prompt_and_scored_tokens_however_long_tokens_are(texts):
    task = Ppl(tokens=5, scored=6, file=texts, held_out=0.5)
    for index in range(10):
        piece = example_of(task, letters(lambda text: len(text.split())), seed=0, index=index).context
        assert len(piece.split()) >= 11
    assert task.new_tokens == 6
    assert task.forced


def test_texts_that_hold_too_little_are_refused(texts):
    with pytest.raises(UserError, match="hold too little for 300 tokens: give more with file or held_out, or lower"):
        example_of(Ppl(tokens=100, scored=200, file=texts, held_out=0.1), letters(len), seed=0, index=0)
    with pytest.raises(UserError, match="There is no text 'nowhere.txt'"):
        example_of(Ppl(file="nowhere.txt"), letters(len), seed=0, index=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, r"ppl\(tokens\) is 0; it must be at least 1"),
        ({"scored": 0}, r"ppl\(scored\) is 0; it must be at least 1"),
        ({"held_out": 0.0}, r"ppl\(held_out\) is 0.0"),
        ({"held_out": 1.5}, r"ppl\(held_out\) is 1.5"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(UserError, match=message):
        Ppl(**arguments)


def test_nothing_is_generated_that_could_be_scored():
    with pytest.raises(NotImplementedError, match="by likelihood alone"):
        Ppl().score("", Example(context="a", question="", answer=""))


def test_the_default_texts_are_long_enough(shared_data):
    example = Ppl().example(np.random.default_rng(0), letters(len))
    assert len(example.context) == 1012
