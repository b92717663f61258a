"""The byte tokenizer's files (its use: test_text.py)."""

import json

import pytest

from kvjax.byte_tokenizer import SPECIAL_TOKENS, byte_characters, write_byte_tokenizer
from kvjax.errors import UserError
from kvjax.filler import excerpts
from kvjax.symbols import SYMBOLS, num_tokens
from kvjax.task import TASKS, Material, example_of
from kvjax.text import load_tokenizer
from tests.puzzles import MATERIAL

PROSE = Material(filler=excerpts("[Exit]\n<17 men> & a <b>;\tx[i]=3<4>> 'IN' [IN ] <100> $5. " * 40), count=num_tokens)
"""Filler that looks like symbols."""


@pytest.fixture(scope="module")
def with_symbols(tmp_path_factory):
    """A tokenizer with symbols and ten tokens to spare."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder, vocab_size=384, max_positions=99, symbols=SYMBOLS)
    return load_tokenizer(folder)


def test_every_byte_has_a_character_of_its_own():
    characters = byte_characters()
    assert len(set(characters)) == 256
    assert characters[ord("A")] == "A"
    assert characters[ord(" ")] == "\u0120"  # the GPT-2 convention
    assert characters[ord("\n")] == "\u010a"


def test_ids_fill_the_vocabulary(tmp_path):
    write_byte_tokenizer(tmp_path, vocab_size=270, max_positions=99)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 270
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == [256, 257, 258]
    assert tokenizer.encode("<|0|>a<|10|>") == [259, ord("a"), 269]
    assert tokenizer.decode([259], skip_special_tokens=True) == "<|0|>"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 99


def test_symbols_are_one_token_each_and_decode_to_themselves(with_symbols):
    ids = [with_symbols.encode(one) for one in SYMBOLS]
    assert ids == [[259 + index] for index in range(len(SYMBOLS))]
    assert [with_symbols.decode(one) for one in ids] == list(SYMBOLS)
    assert with_symbols.encode("".join(SYMBOLS)) == [token for one in ids for token in one]
    assert with_symbols.vocab_size == 384
    assert with_symbols.encode("<|9|>") == [382]


def test_symbols_among_letters_come_back(with_symbols):
    text = "see [FACT]<17><5>, <b> & [x] <100>\n[ANS]"
    tokens = with_symbols.encode(text)
    assert len(tokens) == num_tokens(text)
    assert with_symbols.decode(tokens) == text
    assert with_symbols.stream().push(tokens) == text


@pytest.mark.parametrize("name", [name for name in TASKS.names() if TASKS.get(name).symbols])
def test_tokens_of_every_task_are_as_many_as_the_task_counts(with_symbols, name):
    for material in (MATERIAL, PROSE):
        for index in range(5):
            example = example_of(TASKS.get(name)(), material, seed=0, index=index)
            for text in (example.context, example.question, example.answer):
                tokens = with_symbols.encode(text, add_special_tokens=False)
                assert len(tokens) == num_tokens(text)
                assert with_symbols.decode(tokens) == text


@pytest.mark.parametrize(("vocab_size", "symbols"), [(258, ()), (300, SYMBOLS)])
def test_a_vocabulary_that_is_too_small_is_refused(tmp_path, vocab_size, symbols):
    needed = 259 + len(symbols)
    with pytest.raises(UserError, match=f"vocab_size is {vocab_size}; bytes, special tokens and symbols take {needed}"):
        write_byte_tokenizer(tmp_path, vocab_size=vocab_size, max_positions=99, symbols=symbols)
    assert not list(tmp_path.iterdir())
