"""The byte tokenizer's files (its use: test_text.py)."""

import json

from kvjax.byte_tokenizer import SPECIAL_TOKENS, byte_characters, write_byte_tokenizer
from kvjax.text import load_tokenizer


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
