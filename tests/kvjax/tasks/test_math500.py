"""Competition problems: what is asked, and answers right and wrong (what is the same: test_answers.py)."""

import json

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.math500 import Math500
from tests.contract.tasks import PROBLEMS
from tests.wordings import CHAT, some_examples

FILE = str(PROBLEMS / "math500.json")
EXAMPLE = Example(context="", question="", answer=r"\boxed{\frac{1}{2}}")


def test_problems_are_asked_in_order():
    task = Math500(file=FILE)
    rows = json.loads((PROBLEMS / "math500.json").read_text())
    assert task.num_examples == len(rows) == 10
    for row, example in zip(rows, some_examples(task, material=CHAT, count=10), strict=True):
        assert example.context == f"<user> {row['problem']}\n\n"
        assert example.question.endswith(r"in a box: \boxed{ANSWER} <assistant> ")
        assert example.answer == rf"\boxed{{{row['answer']}}}"
        assert task.score(row["solution"], example) == 1.0


@pytest.mark.parametrize(
    "output",
    [
        r"So it is $\boxed{\frac{1}{2}}$.",
        r"\boxed{7}, no: \boxed{0.5}",
        r"<think>\boxed{7}</think> \boxed{\dfrac12}",
        "The final answer is 1/2.",
        r"Answer: $\tfrac{1}{2}$",
    ],
)
def test_right(output):
    assert Math500().score(output, EXAMPLE) == 1.0


@pytest.mark.parametrize(
    "output", ["", "1/2", r"\frac{1}{2}", r"\boxed{2}", r"\boxed{\frac12}, no: \boxed{2}", r"\boxed{"]
)
def test_wrong(output):
    assert Math500().score(output, EXAMPLE) == 0.0


def test_the_published_problems(shared_data):
    path = shared_data / "math500" / "math500.json"
    task = Math500(file=str(path))
    rows = json.loads(path.read_text())
    examples = some_examples(task, count=500)
    assert task.num_examples == 500
    assert all(task.score(row["solution"], example) == 1.0 for row, example in zip(rows, examples, strict=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"problem": "a"}]', "entry 1 has no 'answer'; it has problem"),
        ('[{"problem": "a", "answer": 2}]', "entry 1: the field 'answer' has a value of type int"),
        ('{"problem": "a", "answer": "2"}', "holds a dict; a list of objects was expected"),
    ],
)
def test_malformed_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        some_examples(Math500(file=str(tmp_path / "a.json")), count=1)


def test_other_mistakes():
    with pytest.raises(UserError, match="There is no file of problems 'x.json'"):
        some_examples(Math500(file="x.json"))
    with pytest.raises(UserError, match=r"math500\(new_tokens\) is 0; it must be at least 1"):
        Math500(new_tokens=0)
