"""Word problems: what is asked, and answers right and wrong."""

import json

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.gsm8k import Gsm8k
from tests.contract.tasks import PROBLEMS
from tests.wordings import CHAT, some_examples

FILE = str(PROBLEMS / "gsm8k.jsonl")
EXAMPLE = Example(context="", question="", answer="#### 1200")


def test_problems_are_asked_in_order():
    task = Gsm8k(file=FILE)
    assert task.num_examples == 10
    for chat, row, example in zip(
        some_examples(task, material=CHAT, count=10),
        map(json.loads, (PROBLEMS / "gsm8k.jsonl").read_text().splitlines()),
        some_examples(task, count=10),
        strict=True,
    ):
        assert example.context == f"{row['question']}\n\n"
        assert chat.context == f"<user> {row['question']}\n\n"
        assert chat.question == example.question.removesuffix("\nSolution:") + " <assistant> "
        assert task.score(row["answer"], example) == 1.0
    assert example.answer == "#### 900000"
    assert example.facts == {"index": 9}


@pytest.mark.parametrize(
    "output",
    [
        "60 * 20 = 1200\n#### 1200",
        "#### 1,200.00",
        "#### $1,200 dollars\n\nQuestion: ... #### 7",
        r"<think>#### 7</think>It is \boxed{1200}.",
        "The answer is 1200.",
    ],
)
def test_right(output):
    assert Gsm8k().score(output, EXAMPLE) == 1.0


@pytest.mark.parametrize(
    "output", ["", "1200", "60 * 20 = 1200 and so", "#### 12", "#### -1200", "#### 1200.5", r"\boxed{12} or 1200"]
)
def test_wrong(output):
    """Also a number that merely stands last: the chain of thought may have been cut there."""
    assert Gsm8k().score(output, EXAMPLE) == 0.0


def test_the_published_problems(shared_data):
    task = Gsm8k(file=str(shared_data / "gsm8k" / "test.jsonl"))
    assert task.num_examples == 1319
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    examples = some_examples(task, count=1319)
    assert all(task.score(row["answer"], example) == 1.0 for row, example in zip(rows, examples, strict=True))
    assert len({example.answer for example in examples}) > 300


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "a", "answer": "none"}', "line 1: the answer ends in no number behind '####'"),
        ('{"question": "a"}', "line 1 has no 'answer'; it has question"),
        ('{"question": 1, "answer": "#### 1"}', "line 1: the field 'question' has a value of type int"),
        ("[]", "line 1 holds a list; an object such as"),
    ],
)
def test_malformed_files_are_refused(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        some_examples(Gsm8k(file=str(tmp_path / "a.jsonl")), count=1)


def test_other_mistakes():
    with pytest.raises(UserError, match="There is no file of problems 'x.jsonl'"):
        some_examples(Gsm8k(file="x.jsonl"))
    with pytest.raises(UserError, match="has 10 examples, and number 11 is wanted"):
        some_examples(Gsm8k(file=FILE), count=11)
    with pytest.raises(UserError, match=r"gsm8k\(tokens=9,.*has 9 tokens, and what it holds takes \d+"):
        some_examples(Gsm8k(file=FILE, tokens=9))
    with pytest.raises(UserError, match=r"gsm8k\(new_tokens\) is 0; it must be at least 1"):
        Gsm8k(new_tokens=0)
