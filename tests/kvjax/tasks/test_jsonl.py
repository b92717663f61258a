"""Prompts of one's own, and the ways of comparing answers."""

import json

import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.jsonl import Jsonl
from tests.contract.tasks import PROBLEMS
from tests.wordings import CHAT, some_examples

FILE = str(PROBLEMS / "own.jsonl")


def written(folder, *rows):
    path = folder / "a.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_contexts_and_prompts():
    task = Jsonl(file=FILE)
    assert task.num_examples == 10
    first, _, third = some_examples(task, count=3)
    assert first == Example(
        context="The kite is red. The boat is grey.\n\n",
        question="Which colour has the kite?",
        answer="red",
        accepted=("it is red",),
        facts={"id": "own-0"},
    )
    assert third == Example(context="Say the word lamp.", question="", answer="lamp", facts={"id": 2})
    chat = some_examples(task, material=CHAT, count=3)
    assert chat[0].context == "<user> The kite is red. The boat is grey.\n\n"
    assert chat[0].question == "Which colour has the kite? <assistant> "
    assert (chat[2].context, chat[2].question) == ("<user> Say the word lamp.", " <assistant> ")


def test_texts_stay_as_they_are_without_a_template(tmp_path):
    file = written(tmp_path, {"prompt": " a\n", "answer": 3}, {"context": "b ", "question": " c ", "answer": "d"})
    one, other = some_examples(Jsonl(file=file), count=2)
    assert (one.context, one.question, one.answer) == (" a\n", "", "3")
    assert (other.context, other.question) == ("b ", " c ")


SCORES = [
    ("exact", "The red kite", ["a red kite.", " RED  KITE\n", "<think>blue</think>red kite"], ["red", "the red kites"]),
    ("exact", "-5", ["-5", "-5."], ["5", "- 5", ""]),
    ("exact", "+", ["+", " + "], ["-", "", "++"]),
    ("contains", "red kite", ["It is the Red Kite.", "red kite"], ["red", "kite red", "red kites", "bored kite", ""]),
    ("number", "1,200", ["1200", "so 60 * 20 = 1200.00", "#### 1200 and 7", r"\boxed{1200}"], ["12", "1200 or 7", ""]),
]


@pytest.mark.parametrize(("match", "answer", "right", "wrong"), SCORES)
def test_scores(match, answer, right, wrong):
    task = Jsonl(file=FILE, match=match)
    example = Example(context="", question="", answer=answer)
    assert [task.score(output, example) for output in right] == [1.0] * len(right)
    assert [task.score(output, example) for output in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("match", "answers"), [("exact", ("a1", "b2")), ("contains", ("a1", "b2")), ("number", ("1", "2"))]
)
def test_each_accepted_answer_is_right(match, answers):
    example = Example(context="", question="", answer=answers[0], accepted=answers[1:])
    scores = [Jsonl(file=FILE, match=match).score(output, example) for output in (*answers, "c3")]
    assert scores == [1.0, 1.0, 0.0]


GOOD = {"prompt": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2 is not JSON in UTF-8"),
        ("3", 'line 2 holds a int; an object such as {"prompt": "...", "answer": "..."} was expected'),
        ({"prompt": "a"}, "line 2 has no 'answer'; it has prompt"),
        ({"promt": "a", "answer": "b"}, "line 2: Unknown field 'promt'. Did you mean 'prompt'"),
        ({"answer": "b"}, 'line 2: give either "prompt", or "context" and "question"'),
        ({"context": "a", "answer": "b"}, 'line 2: give either "prompt", or "context" and "question"'),
        ({"prompt": "a", "question": "c", "answer": "b"}, 'line 2: give either "prompt"'),
        ({"prompt": "a", "context": "c", "question": "d", "answer": "b"}, 'line 2: give either "prompt"'),
        ({"prompt": 1, "answer": "b"}, "line 2: the field 'prompt' has a value of type int"),
        ({"prompt": " ", "answer": "b"}, "line 2: the prompt is empty"),
        ({"prompt": "a", "answer": []}, "line 2: there is no answer, or an empty one"),
        ({"prompt": "a", "answer": ["b", " "]}, "line 2: there is no answer, or an empty one"),
        ({"prompt": "a", "answer": True}, "line 2: the field 'answer' has a value of type bool"),
        ({"prompt": "a", "answer": "b", "id": None}, "line 2: the field 'id' has a value of type NoneType"),
    ],
)
def test_malformed_lines_are_refused_in_one_line(tmp_path, row, message):
    with pytest.raises(UserError) as caught:
        some_examples(Jsonl(file=written(tmp_path, GOOD, row)), count=2)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="line 1: the answer is no number, which match=number compares"):
        some_examples(Jsonl(file=written(tmp_path, GOOD), match="number"), count=1)
    with pytest.raises(UserError, match=r"jsonl needs a file: jsonl\(file=problems.jsonl\)"):
        Jsonl()
    with pytest.raises(UserError, match=r"jsonl\(match\) is contain; it must be one of .* The nearest is contains"):
        Jsonl(file=FILE, match="contain")
    with pytest.raises(UserError, match=r"jsonl\(tokens=2,.* what it holds takes 16: raise tokens"):
        some_examples(Jsonl(file=FILE, tokens=2))
