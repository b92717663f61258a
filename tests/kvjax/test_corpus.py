"""Texts to train on."""

import numpy as np
import pytest

from kvjax.byte_tokenizer import END_OF_TEXT_ID
from kvjax.corpus import load_corpus, read_documents
from kvjax.errors import UserError


def test_documents_of_each_kind(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("licence\n*** START OF THE BOOK ***\n\nCall me.\n\n*** END OF THE BOOK ***\nmore licence\n")
    assert read_documents(book) == ["Call me.\n"]
    plain = tmp_path / "plain.txt"
    plain.write_text("To be, or not.\n")
    assert read_documents(plain) == ["To be, or not.\n"]
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1+1?", "answer": "2"}\n\n{"question": "q", "answer": "a"}\n')
    assert read_documents(problems) == ["Question: 1+1?\nAnswer: 2", "Question: q\nAnswer: a"]


def test_the_tail_is_held_out(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + index % 26) for index in range(1000)))
    corpus = load_corpus([str(text)], held_out_share=0.1, row_tokens=8)
    assert (len(corpus.train), len(corpus.held_out)) == (901, 101)  # the newline and the end token count
    assert corpus.held_out[-1] == END_OF_TEXT_ID
    rows = corpus.held_out_rows(rows=3, tokens=8)
    np.testing.assert_array_equal(rows, [corpus.held_out[start : start + 9] for start in (0, 46, 92)])


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="No texts to train on"):
        load_corpus([], held_out_share=0.1, row_tokens=8)
    with pytest.raises(UserError, match="There is no text 'none.txt'"):
        load_corpus(["none.txt"], held_out_share=0.1, row_tokens=8)
    short = tmp_path / "short.txt"
    short.write_text("hello")
    with pytest.raises(UserError, match="fewer than a row of 8 tokens"):
        load_corpus([str(short)], held_out_share=0.1, row_tokens=8)
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "1+1?"}')
    with pytest.raises(UserError, match="holds a line that is no"):
        read_documents(problems)
