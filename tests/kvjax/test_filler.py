"""Text that means nothing has the length that was asked for."""

import re

import numpy as np
import pytest

from kvjax.filler import excerpts, sentences, sentences_of_tokens
from kvjax.symbols import num_tokens


def rng(seed=0):
    return np.random.default_rng(seed)


def num_words(text):
    return len(text.split())


@pytest.mark.parametrize("length", [0, 1, 37, 1000])
def test_sentences_have_exactly_that_many_characters_each_a_token(length):
    text = sentences(rng(), length)
    assert len(text) == num_tokens(text) == length
    assert text.isascii()


def test_sentences_begin_with_a_capital_and_end_with_a_full_stop():
    text = sentences(rng(), 5000)
    whole = text[: text.rindex(". ") + 2]
    pieces = re.findall(r"[^.]*\. ", whole)
    assert "".join(pieces) == whole
    assert all(re.fullmatch(r"[A-Z][A-Za-z ]+\. ", piece) for piece in pieces)
    assert len(set(pieces)) > 0.9 * len(pieces)


def test_seeds_decide_the_sentences():
    assert sentences(rng(1), 100) == sentences(rng(1), 100)
    assert sentences(rng(1), 100) != sentences(rng(2), 100)


@pytest.mark.parametrize("count", [num_words, len])
def test_whole_sentences_of_at_most_so_many_tokens(count):
    take = sentences_of_tokens(count)
    for seed in range(5):
        text = take(rng(seed), 200)
        assert text.endswith(". ")
        assert 200 - 80 < count(text) <= 200  # no sentence has 80 characters
        assert text == sentences(rng(seed), len(text))
    assert take(rng(), 0) == ""


def test_excerpts_come_from_anywhere_in_the_text():
    text = "".join(chr(index) for index in range(32, 127))
    take = excerpts(text)
    pieces = [take(rng(seed), 10) for seed in range(300)]
    assert all(len(piece) == 10 and piece in text for piece in pieces)
    starts = {text.index(piece) for piece in pieces}
    assert len(starts) > 70
    assert min(starts) < 5
    assert max(starts) > 80
    assert take(rng(3), 10) == pieces[3]


def test_an_excerpt_longer_than_the_text_is_the_text():
    assert excerpts("short")(rng(), 10) == "short"
    assert excerpts("exact")(rng(), 5) == "exact"
