"""Files of JSON objects, and the place of whatever is wrong in them (other malformed lines: test_decode.py)."""

import os

import pytest

from kvjax.errors import UserError
from kvjax.records import check_text, json_lines, read_records, record_at, record_field

EXAMPLE = '{"a": 1}'


def read(path):
    return read_records(str(path), kind="file of things", example=EXAMPLE)


def test_lines_and_lists(tmp_path):
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text('{"a": "x\\u2028y"}\n\n  \n{"a": 2}')
    listed.write_text('[{"a": 1},\n {"a": 2}]')
    assert read(lines) == ((f"{lines} line 1", {"a": "x\u2028y"}), (f"{lines} line 4", {"a": 2}))
    assert read(listed) == ((f"{listed} entry 1", {"a": 1}), (f"{listed} entry 2", {"a": 2}))


def test_a_file_is_read_once_until_it_changes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}')
    first = read(path)
    assert read(path) is first
    path.write_text('{"a": 2}')
    os.utime(path, ns=(1, 1))
    assert read(path)[0][1] == {"a": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl line 2 is not JSON in UTF-8: .* Mend it and run again"),
        ("a.jsonl", b"\xff\n", "a.jsonl line 1 is not JSON in UTF-8"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a.jsonl line 2 holds a list; an object such as \{\"a\": 1\} was expected"),
        ("a.jsonl", b'{"a": "\\ud800"}', "a.jsonl line 1 holds a character that is not Unicode text"),
        ("a.jsonl", b"\n", r"a.jsonl is empty; a file of things was expected, with objects such as \{\"a\": 1\}"),
        ("a.json", b"[1]", "a.json entry 1 holds a int"),
        ("a.json", b"{}", "a.json holds a dict; a list of objects was expected"),
        ("a.json", b"[", "a.json is not JSON"),
        ("a.json", b"[" * 100_000, "a.json is not JSON"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="There is no file of things"):
        read(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="is a folder; a file of things was expected"):
        read(tmp_path)


def test_good_lines_come_before_the_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nx')
    lines = json_lines(path, example=EXAMPLE)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(UserError, match="line 2"):
        next(lines)


def test_fields():
    record = {"a": 1, "b": True, "c": "x"}
    assert record_field(record, "a", int, "here") == 1
    assert record_field(record, "c", (int, str), "here") == "x"
    with pytest.raises(UserError, match="^here has no 'd'; it has a, b, c"):
        record_field(record, "d", int, "here")
    with pytest.raises(UserError, match="^here: the field 'b' has a value of type bool"):
        record_field(record, "b", int, "here")
    with pytest.raises(UserError, match="^here: the field 'c' has a value of type str"):
        record_field(record, "c", int, "here")


def test_the_record_of_a_number():
    records = (("line 1", {"a": 1}),)
    assert record_at(records, 0, "jsonl") == ("line 1", {"a": 1})
    with pytest.raises(UserError, match="^jsonl has 1 examples, and number 2 is wanted: ask for fewer"):
        record_at(records, 1, "jsonl")


def test_half_a_surrogate_pair_is_no_text():
    check_text("é 🤗", "here")
    with pytest.raises(UserError, match="^here holds a character"):
        check_text("\ud83e", "here")
