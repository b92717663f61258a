"""Symbols as text, their count, and pieces scattered among filler."""

import numpy as np
import pytest

from kvjax.filler import sentences
from kvjax.symbols import MARKERS, NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, num_tokens, scatter, spell, symbol


def letters(rng, count):
    """Filler in which each character says where it stands."""
    return "".join(chr(ord("a") + index % 26) for index in range(count))


def test_symbols_are_markers_and_a_hundred_numbers():
    assert len(SYMBOLS) == len(set(SYMBOLS)) == len(MARKERS) + NUM_SYMBOLS == 114
    assert SYMBOLS[0] == "[FACT]"
    assert SYMBOLS[len(MARKERS) :][7] == symbol(7) == "<7>"


def test_spelling_joins_markers_and_numbers():
    assert spell("[FACT]", 17, 5) == "[FACT]<17><5>"
    assert spell() == ""


def test_keys_differ_and_are_no_digits():
    keys = draw_keys(np.random.default_rng(0), NUM_SYMBOLS - NUM_DIGITS)
    assert sorted(keys) == list(range(10, 100))
    assert all(type(key) is int for key in draw_keys(np.random.default_rng(0), 3))
    assert draw_keys(np.random.default_rng(1), 3) != draw_keys(np.random.default_rng(2), 3)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("abc", 3),
        ("a\nb", 3),
        ("<7><99>", 2),
        ("[FACT]<17><5>.", 4),
        ("<100>", 5),  # no symbol
        ("[FAC]", 5),
        ("[fact]", 6),
        ("<a[ANS]<", 4),
    ],
)
def test_a_symbol_counts_as_one_token_and_so_does_any_other_character(text, count):
    assert num_tokens(text) == count


def test_each_symbol_is_one_token():
    assert all(num_tokens(one) == 1 for one in SYMBOLS)
    assert num_tokens("".join(SYMBOLS)) == len(SYMBOLS)


@pytest.mark.parametrize("num_filler", [0, 1, 50])
def test_scattered_pieces_come_in_order_and_the_filler_is_whole(num_filler):
    for seed in range(20):
        text = scatter(["[ANS]", "[EX]", "[END]"], num_filler, np.random.default_rng(seed), letters)
        assert text.index("[ANS]") < text.index("[EX]") < text.index("[END]")
        assert text.replace("[ANS]", "").replace("[EX]", "").replace("[END]", "") == letters(None, num_filler)


def test_a_piece_lies_where_its_depth_says_whatever_the_others_do():
    for depth, before in [(0.0, 0), (0.1, 5), (0.5, 25), (1.0, 50)]:
        for seed in range(10):
            text = scatter(["[ANS]", "[EX]", "[END]"], 50, np.random.default_rng(seed), letters, depths={1: depth})
            start = text.split("[EX]")[0].replace("[ANS]", "").replace("[END]", "")
            assert start == letters(None, before)


def test_pieces_lie_anywhere():
    places = [
        len(scatter(["[ANS]"], 100, np.random.default_rng(seed), letters).split("[ANS]")[0]) for seed in range(60)
    ]
    assert min(places) < 10
    assert max(places) > 90


def test_no_pieces_leave_the_filler():
    rng = np.random.default_rng(0)
    assert scatter([], 20, rng, sentences) == sentences(np.random.default_rng(0), 20)
