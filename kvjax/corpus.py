"""Texts to train on: files as rows of byte tokens, a share of each held out."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvjax.byte_tokenizer import END_OF_TEXT_ID
from kvjax.errors import UserError
from kvjax.folder import find_file


def read_documents(path: Path) -> list[str]:
    """The documents of a file: the whole of a text, a problem and its solution of each line of a JSONL file.

    Args:
      path: `.jsonl` with "question" and "answer" on each line, or any other ending for UTF-8 text. The licence
        text around a Project Gutenberg book is cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from error
    if path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            return [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f'{path} holds a line that is no {{"question": ..., "answer": ...}}: {error}.') from error
    lines = text.splitlines(keepends=True)
    starts = [index + 1 for index, line in enumerate(lines) if line.startswith("*** START OF")]
    ends = [index for index, line in enumerate(lines) if line.startswith("*** END OF")]
    return ["".join(lines[starts[0] if starts else 0 : ends[-1] if ends else None]).strip() + "\n"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Byte tokens of all texts, documents separated by the end-of-text token.

    Attributes:
      train: tokens to learn from, int32.
      held_out: tokens that training never sees, int32: the tail of each file.
    """

    train: np.ndarray
    held_out: np.ndarray

    def held_out_rows(self, *, rows: int, tokens: int) -> np.ndarray:
        """Evenly spaced rows of the held-out tokens, `rows tokens+1`."""
        starts = np.linspace(0, len(self.held_out) - tokens - 1, rows).astype(np.int64)
        return np.stack([self.held_out[start : start + tokens + 1] for start in starts])


def load_corpus(paths: Sequence[str], *, held_out_share: float, row_tokens: int) -> Corpus:
    """Reads texts.

    Args:
      paths: files, relative to here or to the project's root.
      held_out_share: share of each file's bytes, its end, kept for validation, in (0, 1).
      row_tokens: tokens of the longest row that will be asked for.

    Raises:
      UserError: a file is missing or malformed, no file is named, or the texts are shorter than a row.
    """
    if not paths:
        raise UserError("No texts to train on: name at least one file in config.texts.")
    train, held_out = [], []
    for path in paths:
        tokens = [_tokens(document) for document in read_documents(find_file(path, "text"))]
        joined = np.concatenate(tokens)
        cut = int(len(joined) * (1 - held_out_share))
        train.append(joined[:cut])
        held_out.append(joined[cut:])
    corpus = Corpus(np.concatenate(train), np.concatenate(held_out))
    for name, tokens in (("to train on", corpus.train), ("held out", corpus.held_out)):
        if len(tokens) <= row_tokens:
            raise UserError(f"The texts have {len(tokens)} bytes {name}, fewer than a row of {row_tokens} tokens.")
    return corpus


def _tokens(document: str) -> np.ndarray:
    """Byte tokens of a document with the end-of-text token behind them."""
    data = np.frombuffer(document.encode("utf-8"), np.uint8).astype(np.int32)
    return np.append(data, np.int32(END_OF_TEXT_ID))
