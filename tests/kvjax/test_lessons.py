"""Rows to learn from: what weighs, what fits, what decides them."""

import numpy as np
import pytest

from kvjax.byte_tokenizer import END_OF_TEXT_ID, write_byte_tokenizer
from kvjax.corpus import Corpus
from kvjax.errors import UserError
from kvjax.lessons import Lessons
from kvjax.symbols import SYMBOLS
from kvjax.task import TASKS
from kvjax.text import load_tokenizer

LEARNED = [name for name in TASKS.names() if hasattr(TASKS.get(name), "sized")]
MIX = {"needle": 0.3, "sums": 0.3, "text": 0.4}
TEXT_WEIGHT = 0.25
BOOKS = "0123456789" * 200
"""Told apart from sentences, which have no digits."""
ANS, END = (259 + SYMBOLS.index(marker) for marker in ("[ANS]", "[END]"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, vocab_size=384, max_positions=256, symbols=SYMBOLS)
    return load_tokenizer(folder)


@pytest.fixture
def make(tokenizer):
    def lessons(mix, books=BOOKS):
        corpus = Corpus(train=np.arange(400, dtype=np.int32) % 97 % 89, held_out=np.zeros(100, np.int32))
        return Lessons(tokenizer, corpus, books, mix, text_weight=TEXT_WEIGHT)

    return lessons


def answers_in(row):
    """(first, last) of each answer: behind [ANS], up to and with [END]."""
    return [(start + 1, start + 1 + list(row[start:]).index(END)) for start in np.flatnonzero(row == ANS)]


@pytest.mark.parametrize("name", LEARNED)
def test_weights_lie_on_answers_and_nowhere_else(make, name):
    rows = make({name: 1.0}).batch(0, seed=0, rows=24, tokens=96)
    for row, weights, first, last in zip(rows.tokens, rows.weights, rows.first, rows.last, strict=True):
        expected = np.zeros(97, np.float32)
        for start, stop in answers_in(row):
            expected[start:stop] = 1.0
        np.testing.assert_array_equal(weights, expected)
        assert (first, last) == answers_in(row)[0]


@pytest.mark.parametrize("tokens", [48, 50, 64, 200])
@pytest.mark.parametrize("name", LEARNED)
def test_rows_fit_whatever_is_drawn(make, name, tokens):
    lessons = make({name: 1.0})
    rows = lessons.batch(1, seed=0, rows=16, tokens=tokens)
    assert rows.tokens.shape == rows.weights.shape == (16, tokens + 1)
    assert (rows.tokens.dtype, rows.weights.dtype, rows.first.dtype, rows.last.dtype) == (
        *(np.int32, np.float32, np.int32, np.int32),
    )
    assert (rows.first > 0).all()
    assert (rows.first < rows.last).all()
    assert (rows.last <= tokens + 1).all()


def test_what_is_left_over_is_padding_without_weight(make):
    rows = make({"dfs": 1.0}).batch(0, seed=0, rows=24, tokens=96)
    padded = 0
    for row, weights, last in zip(rows.tokens, rows.weights, rows.last, strict=True):
        np.testing.assert_array_equal(row[last:], END_OF_TEXT_ID)  # a tree has one question
        np.testing.assert_array_equal(weights[last:], 0.0)
        padded += last < 97
    assert padded


def test_questions_follow_until_there_is_no_room(make):
    rows = make({"needle": 1.0}).batch(0, seed=0, rows=24, tokens=96)
    counts = [len(answers_in(row)) for row in rows.tokens]
    assert min(counts) >= 1
    assert max(counts) > 5
    free = np.sum(rows.tokens == END_OF_TEXT_ID, axis=1)
    assert free.max() < 3 + 4  # a question and its answer


def test_rows_of_text_are_pieces_of_the_corpus_and_weigh_what_text_weighs(make):
    lessons = make({"text": 1.0})
    rows = lessons.batch(0, seed=0, rows=8, tokens=64)
    train = lessons.corpus.train
    for row in rows.tokens:
        assert any((row == train[start : start + 65]).all() for start in range(len(train) - 64))
    np.testing.assert_array_equal(rows.weights, np.full((8, 65), TEXT_WEIGHT, np.float32))
    np.testing.assert_array_equal([rows.first, rows.last], 0)
    assert len({row.tobytes() for row in rows.tokens}) == 8


def test_seed_and_step_decide_a_batch(make):
    def batch(step, seed):
        return make(MIX).batch(step, seed=seed, rows=4, tokens=64)

    for one, same in zip(batch(3, 0).__dict__.values(), batch(3, 0).__dict__.values(), strict=True):
        np.testing.assert_array_equal(one, same)
    assert len({batch(step, seed).tokens.tobytes() for step in (3, 4) for seed in (0, 1)}) == 4


def test_rows_to_test_on_are_never_learned_from(make):
    lessons = make({"hops": 0.5, "needle": 0.5})
    learned = {row.tobytes() for step in range(8) for row in lessons.batch(step, seed=0, rows=16, tokens=64).tokens}
    for name in lessons.tasks:
        rows = lessons.test_rows(name, seed=0, rows=16, tokens=64)
        tested = {row.tobytes() for row in rows.tokens}
        assert len(tested) == 16
        assert not tested & learned
        again = lessons.test_rows(name, seed=0, rows=16, tokens=64)
        np.testing.assert_array_equal(rows.tokens, again.tokens)


def test_rows_to_test_on_are_of_one_task(make):
    rows = make(MIX).test_rows("sums", seed=0, rows=8, tokens=64)
    assert (np.sum(rows.tokens == 259 + SYMBOLS.index("[SUM]"), axis=1) >= 1).all()


def test_tasks_are_drawn_by_their_shares(make):
    lessons = make({"copy": 6.0, "text": 2.0, "needle": 0.0})
    rows = [lessons.batch(step, seed=0, rows=40, tokens=48) for step in range(10)]
    text = np.mean([np.mean(one.last == 0) for one in rows])
    assert 0.18 < text < 0.32
    assert not any((one.tokens == 259 + SYMBOLS.index("[ASK]")).any() for one in rows)


def test_filler_is_cut_from_books_in_about_half_of_the_rows(make):
    def shares(books):
        rows = make({"passkey": 1.0}, books=books).batch(0, seed=0, rows=60, tokens=64)
        digits = (rows.tokens >= ord("0")) & (rows.tokens <= ord("9"))
        return np.mean(digits.any(axis=1))

    assert 0.3 < shares(BOOKS) < 0.7
    assert shares("") == 0.0


def test_tasks_of_the_mix_leave_out_text(make):
    assert make(MIX).tasks == ("needle", "sums")


def test_a_task_without_rows_to_learn_from_is_refused(make):
    with pytest.raises(UserError, match=r"The task 'dormant' has no rows to learn from; take it out of config\.mix\."):
        make({"needle": 0.5, "dormant": 0.5})
    with pytest.raises(UserError, match="Unknown task 'needles'. Did you mean 'needle'"):
        make({"needles": 1.0})
