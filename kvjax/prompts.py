"""Prompts from a JSONL file and results into another, a JSON object a line; a run goes on where it stopped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvjax.errors import UserError, unknown
from kvjax.records import json_lines

_FIELDS = {"prompt": str, "messages": list, "id": (str, int), "seed": int}
SEED_RANGE = range(2**32)
_ROW_START = b'{"line": '


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One line of a prompts file.

    Attributes:
      line: its number, from 1; 0 for a prompt that came from elsewhere.
      text: a plain prompt, or None.
      messages: a conversation, or None.
      id: the caller's name for it, or None.
      seed: for sampling, or None.
    """

    line: int
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    id: str | int | None = None
    seed: int | None = None

    def digest(self) -> str:
        """A short hash of what decides the answer; two prompts of one line differ in it."""
        content = json.dumps([self.text, self.messages, self.seed], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yields the prompts of a JSONL file, in order; blank lines are passed over.

    Args:
      path: one object a line with "prompt" (text) or "messages" (dicts with "role" and "content"), and optionally
        "id" and "seed".

    Raises:
      UserError: when it comes to a line that is malformed; those before it have been yielded.
    """
    for number, fields in json_lines(path, example='{"prompt": "..."}'):
        yield _prompt_of(fields, number, f"{path} line {number}")


def _prompt_of(fields: Mapping[str, Any], number: int, where: str) -> Prompt:
    for name, value in fields.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: {unknown('field', name, _FIELDS)}")
        if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
            raise UserError(f"{where}: the field '{name}' has a value of type {type(value).__name__}.")
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError(f'{where}: give either "prompt" or "messages".')
    messages = fields.get("messages")
    if messages is not None and not (messages and all(_is_message(message) for message in messages)):
        raise UserError(f'{where}: "messages" must be a list of objects with "role" and "content".')
    if fields.get("seed", 0) not in SEED_RANGE:
        raise UserError(f"{where}: the seed {fields['seed']} must be at least 0 and below 2**32.")
    return Prompt(
        line=number,
        text=fields.get("prompt"),
        messages=None if messages is None else tuple(messages),
        id=fields.get("id"),
        seed=fields.get("seed"),
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


class ResultFile:
    """Results as they come, a JSON object a line; lines of an earlier run of the same settings are kept.

    Args:
      path: the file; made if missing.
      settings: what must agree for earlier results to count, as JSON has it.

    Raises:
      UserError: the file holds something else, or results of other settings.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any]):
        self._path = path
        self._settings = json.loads(json.dumps(settings))
        self._finished: dict[int, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self._read()

    def is_finished(self, prompt: Prompt) -> bool:
        """Whether the prompt was answered by an earlier run.

        Raises:
          UserError: that run had another prompt on this line.
        """
        found = self._finished.get(prompt.line)
        if found not in (None, prompt.digest()):
            raise UserError(
                f"{self._path} holds the answer to another prompt of line {prompt.line}; give another --output."
            )
        return found is not None

    def _read(self) -> None:
        data = self._path.read_bytes()
        end = data.rfind(b"\n") + 1
        # Split at line feeds alone: answers may hold other characters that Python takes for ends of lines.
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            self._read_row(line, number)
        half = data[end:]
        if half and not (half.startswith(_ROW_START) or _ROW_START.startswith(half)):
            raise UserError(f"{self._path} ends in something that is not a result; give another --output.")
        if half:  # an earlier run was killed in the middle of a line
            os.truncate(self._path, end)

    def _read_row(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line.decode("utf-8"))
            answered, digest, found = row["line"], row["prompt_sha256"], dict(row["settings"])
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._path} line {number} is not a result of this program; give another --output."
            ) from error
        changed = {name for name in {*found, *self._settings} if found.get(name) != self._settings.get(name)}
        if changed:
            raise UserError(
                f"{self._path} holds results of other settings ({', '.join(sorted(changed))}); give another --output."
            )
        self._finished[answered] = digest

    def write(self, prompt: Prompt, **result: Any) -> None:
        """Appends a result and makes sure that it is on the disk."""
        named = {} if prompt.id is None else {"id": prompt.id}
        row = {
            "line": prompt.line,
            **named,
            **result,
            "prompt_sha256": prompt.digest(),
            "settings": self._settings,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
