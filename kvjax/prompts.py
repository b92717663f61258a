"""Prompts from a JSONL file and results into another, a JSON object a line; a run goes on where it stopped."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvjax.errors import UserError, unknown

_FIELDS = {"prompt": str, "messages": list, "id": (str, int), "seed": int}


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


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Yields the prompts of a JSONL file, in order; blank lines are passed over.

    Args:
      path: one object a line with "prompt" (text) or "messages" (dicts with "role" and "content"), and optionally
        "id" and "seed".

    Raises:
      UserError: when it comes to a line that is malformed; those before it have been yielded.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield _parse(line, number, f"{path} line {number}")


def _lines(file: Any, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}.") from error


def _parse(line: str, number: int, where: str) -> Prompt:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error}. Lines before it are finished; mend it and run again."
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f'{where} holds a {type(fields).__name__}; an object such as {{"prompt": "..."}} was expected.')
    for name, value in fields.items():
        if name not in _FIELDS:
            raise UserError(f"{where}: {unknown('field', name, _FIELDS)}")
        if not isinstance(value, _FIELDS[name]):
            raise UserError(f"{where}: the field '{name}' has a value of type {type(value).__name__}.")
    if ("prompt" in fields) == ("messages" in fields):
        raise UserError(f'{where}: give either "prompt" or "messages".')
    messages = fields.get("messages")
    if messages is not None and not (messages and all(_is_message(message) for message in messages)):
        raise UserError(f'{where}: "messages" must be a list of objects with "role" and "content".')
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
      settings: what must agree for earlier results to count, e.g. the model and the policy.

    Raises:
      UserError: the file holds something else, or results of other settings.
    """

    def __init__(self, path: Path, *, settings: Mapping[str, Any]):
        self._path, self._settings = path, dict(settings)
        self.finished: set[int] = set()
        """Numbers of the lines that need not be run again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._read()

    def _read(self) -> None:
        whole = self._path.read_text(encoding="utf-8")
        end = whole.rfind("\n") + 1
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                self.finished.add(row["line"])
                found = row["settings"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path} line {number} is not a result of this program; give another --output."
                ) from error
            if found != self._settings:
                changed = sorted(key for key in {*found, *self._settings} if found.get(key) != self._settings.get(key))
                raise UserError(
                    f"{self._path} holds results of other settings ({', '.join(changed)}); give another --output."
                )
        half = whole[end:]
        if half and not half.startswith('{"line": '):
            raise UserError(f"{self._path} ends in something that is not a result; give another --output.")
        if half:  # an earlier run was killed in the middle of a line
            self._path.write_text(whole[:end], encoding="utf-8")

    def write(self, prompt: Prompt, **result: Any) -> None:
        """Appends a result and makes sure that it is on the disk."""
        named = {} if prompt.id is None else {"id": prompt.id}
        row = {"line": prompt.line, **named, **result, "settings": self._settings}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
