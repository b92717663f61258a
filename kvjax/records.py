"""Records: files of JSON objects, one a line or all in a list, with the place of whatever is wrong in them."""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvjax.errors import UserError
from kvjax.folder import find_file


def json_lines(path: Path, *, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the objects of a JSONL file with the numbers of their lines, from 1; blank lines are passed over.

    Args:
      path: UTF-8 text, an object a line.
      example: an object as it should be, for messages.

    Raises:
      UserError: when it comes to a line that is malformed; those before it have been yielded.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _object(_parse(line, f"{path} line {number}"), f"{path} line {number}", example)


def read_records(name: str, *, kind: str, example: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """All records of a file, each with the words that say where it stands; read once as long as it stays the same.

    Args:
      name: a file, relative to here or to the project's root: a list of objects in `.json`, else an object a line.
      kind: what the file holds, for messages, e.g. "file of problems".
      example: an object as it should be, for messages.

    Raises:
      UserError: there is no such file, it holds no record, or one that is malformed.
    """
    path = find_file(name, kind)
    if not path.is_file():
        raise UserError(f"{path} is a folder; a {kind} was expected.")
    return _read(path, path.stat().st_mtime_ns, kind, example)


@functools.lru_cache(maxsize=8)
def _read(path: Path, changed: int, kind: str, example: str) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    del changed  # part of the key
    if path.suffix == ".json":
        content = _parse(path.read_bytes(), str(path))
        if not isinstance(content, list):
            raise UserError(f"{path} holds a {type(content).__name__}; a list of objects was expected.")
        places = [(f"{path} entry {number}", entry) for number, entry in enumerate(content, start=1)]
        records = tuple((where, _object(entry, where, example)) for where, entry in places)
    else:
        records = tuple((f"{path} line {number}", entry) for number, entry in json_lines(path, example=example))
    if not records:
        raise UserError(f"{path} is empty; a {kind} was expected, with objects such as {example}.")
    return records


def record_at(records: Sequence[tuple[str, Mapping[str, Any]]], index: int, name: str) -> tuple[str, Mapping[str, Any]]:
    """The record of that number with its place; raises `UserError`, naming the task, if there are fewer."""
    if index >= len(records):
        raise UserError(f"{name} has {len(records)} examples, and number {index + 1} is wanted: ask for fewer.")
    return records[index]


def record_field(record: Mapping[str, Any], field: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """A field of a record; raises `UserError` if it is missing or of another type. True and False are no numbers."""
    if field not in record:
        raise UserError(f"{where} has no '{field}'; it has {', '.join(record) or 'nothing'}.")
    value = record[field]
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{where}: the field '{field}' has a value of type {type(value).__name__}.")
    return value


def check_text(text: str, where: str) -> None:
    """Raises `UserError` for text that has no UTF-8 form (half of a surrogate pair)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where} holds a character that is not Unicode text: {error.reason}.") from error


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON in UTF-8: {error}. Mend it and run again.") from error


def _object(content: Any, where: str, example: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}; an object such as {example} was expected.")
    check_text(json.dumps(content, ensure_ascii=False), where)
    return content
