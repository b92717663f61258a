"""Rows to learn from: what weighs, what fits, what decides them."""

import dataclasses

import numpy as np
import pytest

from kvjax.byte_tokenizer import END_OF_TEXT_ID, write_byte_tokenizer
from kvjax.corpus import Corpus
from kvjax.errors import UserError
from kvjax.lessons import Lessons, check_mix, tasks_of
from kvjax.symbols import SYMBOLS
from kvjax.task import TASKS
from kvjax.text import load_tokenizer

LEARNED = [name for name in TASKS.names() if hasattr(TASKS.get(name), "sized")]
MIX = {"needle": 0.3, "sums": 0.3, "text": 0.4}
TEXT_WEIGHT, FILLER_WEIGHT = 0.25, 0.125
BOOKS = "0123456789" * 200
"""Told apart from sentences, which have no digits."""


def id_of(marker):
    return 259 + SYMBOLS.index(marker)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, vocab_size=384, max_positions=256, symbols=SYMBOLS)
    return load_tokenizer(folder)


@pytest.fixture
def lessons(tokenizer):
    corpus = Corpus(train=np.arange(400, dtype=np.int32) % 97 % 89, held_out=np.zeros(100, np.int32))
    return Lessons(tokenizer, corpus, BOOKS, text_weight=TEXT_WEIGHT, filler_weight=FILLER_WEIGHT)


def answers_in(row):
    """(first, last) of each answer: behind [ANS] or else what is asked for, up to and with [END]."""
    questions, found = [id_of(marker) for marker in ("[ASK]", "[HOP]", "[GET]", "[SUM]", "[DFS]", "[OUT]")], []
    for start in np.flatnonzero(np.isin(row, questions)):
        last = start + 1 + list(row[start:]).index(id_of("[END]"))
        ends = start + np.flatnonzero(row[start:last] == id_of("[ANS]"))
        behind_key = start + (1 if row[start] == id_of("[OUT]") else 2)
        found.append((ends[0] + 1 if len(ends) else behind_key, last))
    return found


@pytest.mark.parametrize("name", LEARNED)
def test_answers_weigh_one_filler_a_little_and_facts_and_questions_nothing(lessons, name):
    rows = lessons.batch(0, mix={name: 1.0}, seed=0, rows=24, tokens=96)
    for row, weights, first, last in zip(rows.tokens, rows.weights, rows.first, rows.last, strict=True):
        expected = np.where(row < 256, np.float32(FILLER_WEIGHT), np.float32(0.0))  # bytes
        for start, stop in answers_in(row):
            expected[start:stop] = 1.0
        np.testing.assert_array_equal(weights, expected)
        assert (first, last) == answers_in(row)[0]


@pytest.mark.parametrize("tokens", [48, 50, 64, 200])
@pytest.mark.parametrize("name", LEARNED)
def test_rows_fit_whatever_is_drawn(lessons, name, tokens):
    rows = lessons.batch(1, mix={name: 1.0}, seed=0, rows=16, tokens=tokens)
    assert rows.tokens.shape == rows.weights.shape == (16, tokens + 1)
    assert (rows.tokens.dtype, rows.weights.dtype, rows.first.dtype, rows.last.dtype) == (
        *(np.int32, np.float32, np.int32, np.int32),
    )
    assert (rows.first > 0).all()
    assert (rows.first < rows.last).all()
    assert (rows.last <= tokens + 1).all()


def test_what_is_left_over_is_padding_without_weight(lessons):
    rows = lessons.batch(0, mix={"dfs": 1.0}, seed=0, rows=24, tokens=96)
    padded = 0
    for row, weights, last in zip(rows.tokens, rows.weights, rows.last, strict=True):
        np.testing.assert_array_equal(row[last:], END_OF_TEXT_ID)  # a tree has one question
        np.testing.assert_array_equal(weights[last:], 0.0)
        padded += last < 97
    assert padded


def test_questions_follow_until_there_is_no_room(lessons):
    rows = lessons.batch(0, mix={"needle": 1.0}, seed=0, rows=24, tokens=96)
    counts = [len(answers_in(row)) for row in rows.tokens]
    assert min(counts) >= 1
    assert max(counts) > 5
    free = np.sum(rows.tokens == END_OF_TEXT_ID, axis=1)
    assert free.max() < 2 + 3  # a question and its answer


def test_rows_of_text_are_pieces_of_the_corpus_and_weigh_what_text_weighs(lessons):
    rows = lessons.batch(0, mix={"text": 1.0}, seed=0, rows=8, tokens=64)
    train = lessons.corpus.train
    for row in rows.tokens:
        assert any((row == train[start : start + 65]).all() for start in range(len(train) - 64))
    np.testing.assert_array_equal(rows.weights, np.full((8, 65), TEXT_WEIGHT, np.float32))
    np.testing.assert_array_equal([rows.first, rows.last], 0)
    assert len({row.tobytes() for row in rows.tokens}) == 8


def test_seed_and_step_decide_a_batch(lessons):
    def batch(step, seed):
        return lessons.batch(step, mix=MIX, seed=seed, rows=4, tokens=64)

    for one, same in zip(batch(3, 0).__dict__.values(), batch(3, 0).__dict__.values(), strict=True):
        np.testing.assert_array_equal(one, same)
    assert len({batch(step, seed).tokens.tobytes() for step in (3, 4) for seed in (0, 1)}) == 4


def test_rows_to_test_on_are_never_learned_from(lessons):
    mix = {"hops": 0.5, "needle": 0.5}
    batches = [lessons.batch(step, mix=mix, seed=0, rows=16, tokens=64) for step in range(8)]
    learned = {row.tobytes() for rows in batches for row in rows.tokens}
    for name in mix:
        rows = lessons.test_rows(name, seed=0, rows=16, tokens=64)
        tested = {row.tobytes() for row in rows.tokens}
        assert len(tested) == 16
        assert not tested & learned
        again = lessons.test_rows(name, seed=0, rows=16, tokens=64)
        np.testing.assert_array_equal(rows.tokens, again.tokens)


def test_rows_to_test_on_are_of_one_task(lessons):
    rows = lessons.test_rows("sums", seed=0, rows=8, tokens=64)
    assert (np.sum(rows.tokens == id_of("[SUM]"), axis=1) >= 1).all()


def test_tasks_are_drawn_by_their_shares(lessons):
    mix = {"copy": 6.0, "text": 2.0, "needle": 0.0}
    rows = [lessons.batch(step, mix=mix, seed=0, rows=40, tokens=48) for step in range(10)]
    text = np.mean([np.mean(one.last == 0) for one in rows])
    assert 0.18 < text < 0.32
    assert not any((one.tokens == id_of("[ASK]")).any() for one in rows)


def test_filler_is_cut_from_books_in_about_half_of_the_rows(lessons):
    def shares(books):
        of_these = dataclasses.replace(lessons, books=books)
        rows = of_these.batch(0, mix={"passkey": 1.0}, seed=0, rows=60, tokens=64)
        digits = (rows.tokens >= ord("0")) & (rows.tokens <= ord("9"))
        return np.mean(digits.any(axis=1))

    assert 0.3 < shares(BOOKS) < 0.7
    assert shares("") == 0.0


def test_tasks_of_a_mix_leave_out_text():
    assert tasks_of(MIX) == ("needle", "sums")


def test_a_task_without_rows_to_learn_from_is_refused():
    check_mix(MIX)
    with pytest.raises(UserError, match=r"The task 'dormant' has no rows to learn from; take it out of config\.mix\."):
        check_mix({"needle": 0.5, "dormant": 0.5})
    with pytest.raises(UserError, match="Unknown task 'needles'. Did you mean 'needle'"):
        check_mix({"needles": 1.0})
