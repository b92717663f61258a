"""Tasks typed as strings, and what is refused with the way out."""

import pytest

from kvjax.errors import UserError
from kvjax.task_grammar import parse_task, split_tasks
from kvjax.tasks.jsonl import Jsonl
from kvjax.tasks.needle import Needle
from kvjax.tasks.niah import Niah


def test_strings_and_tasks_are_taken():
    assert parse_task("needle") == parse_task(" needle() ") == Needle()
    assert parse_task("needle( tokens=512, depth=0.5 )") == Needle(tokens=512, depth=0.5)
    assert parse_task("niah(haystack=needles,new_tokens=9)") == Niah(haystack="needles", new_tokens=9)
    task = Niah(keys=2)
    assert parse_task(task) is task


@pytest.mark.parametrize("file", ["a.jsonl", "../a b, (1).jsonl", "a=b+c;d.jsonl", "{'x'}.jsonl"])
def test_names_of_tasks_read_back_whatever_their_files_are_called(file):
    task = Jsonl(file=file, match="contains")
    assert parse_task(task.name) == task
    assert split_tasks(f"needle,{task.name};copy(length=3)") == ["needle", task.name, "copy(length=3)"]


def test_lists():
    assert split_tasks("needle(tokens=512,depth=0.5), vt;\n cwe ,") == ["needle(tokens=512,depth=0.5)", "vt", "cwe"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "A task is a string such as 'needle'"),
        (None, "A task is a string such as 'needle'"),
        ("neddle", "Unknown task 'neddle'. Did you mean 'needle'"),
        ("needle(dept=0.5)", "Unknown argument of needle 'dept'. Did you mean 'depth'"),
        ("needle(depth=deep)", r"needle\(depth\) is 'deep'; it must be a number"),
        ("needle(tokens=1.5)", r"needle\(tokens\) is '1.5'; it must be a whole number"),
        ("needle(depth=2)", r"needle\(depth\) is 2.0; it must be .* at most 1.0. The nearest is 1.0"),
        ("needle(512)", r"needle takes arguments by name, e.g. needle\(tokens=512\); '512' has none"),
        ("needle(tokens=1,tokens=2)", "gives tokens twice"),
        ("needle(", r"'needle\(' is no task: write NAME"),
        ("needle + vt", "is no task: write NAME"),
        ("jsonl", r"The task jsonl needs a file: jsonl\(file=problems.jsonl\)"),
    ],
)
def test_others_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_task(wrong)
    assert "\n" not in str(caught.value)
