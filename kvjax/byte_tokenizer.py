"""A tokenizer whose tokens are bytes, as the files of a Hugging Face folder; token id = byte value.

Ids 0-255 are bytes, then the special tokens, then symbols that do not occur in ordinary prose, up to `vocab_size`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
END_OF_TEXT_ID = 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers (the GPT-2 convention).

    Printable bytes stand for themselves, the other ones for the characters from U+0100 on, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def write_byte_tokenizer(
    folder: str | Path, *, vocab_size: int, max_positions: int, symbols: Sequence[str] = ()
) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    Args:
      folder: an existing folder.
      vocab_size: V.
      max_positions: tokens of context, for `tokenizer_config.json`.
      symbols: texts that are one token each, behind the special tokens; ids that are left over become `<|0|>`, ...
    """
    vocabulary = {character: index for index, character in enumerate(byte_characters())}
    spare = vocab_size - 256 - len(SPECIAL_TOKENS) - len(symbols)
    symbols = [*symbols, *(f"<|{index}|>" for index in range(spare))]
    added = [
        {
            "id": 256 + index,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": content in SPECIAL_TOKENS,
        }
        for index, content in enumerate([*SPECIAL_TOKENS, *symbols])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": False},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": max_positions,
        "chat_template": _CHAT_TEMPLATE,
    }
    target = Path(folder)
    _write(target / "tokenizer.json", tokenizer)
    _write(target / "tokenizer_config.json", settings)
    _write(target / "generation_config.json", {"eos_token_id": END_OF_TEXT_ID, "pad_token_id": END_OF_TEXT_ID})


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
