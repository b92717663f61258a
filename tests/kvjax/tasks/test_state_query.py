"""The state of a depth-first walk: published problems in our words, problems of our own, states right and wrong."""

import json
import re

import pytest

from kvjax.errors import UserError
from kvjax.tasks.state_query import StateQuery, state_prompt
from tests.wordings import CHAT, MATERIAL, some_examples

PROBLEM = {
    "id": 4,
    "graph": {"nodes": [0, 1, 2], "edges": [[0, 2], [0, 1]]},
    "start_node": 0,
    "steps": 3,
    "answer": {"current_node": 2, "stack": [0, 2], "visited_nodes": [0, 1, 2]},
}


def read_prompt(text):
    """The graph, the start and the steps that a prompt speaks of."""
    (nodes,), (edges,) = re.findall(r"Nodes: (.*)\n", text), re.findall(r"Edges: (.*)\n", text)
    (start,), (steps,) = re.findall(r"from node (\d+)\.", text), re.findall(r"the state after (\d+) steps\?", text)
    return {"nodes": json.loads(nodes), "edges": json.loads(edges)}, int(start), int(steps)


def write(folder, *problems):
    path = folder / "problems.json"
    path.write_text(json.dumps(problems))
    return str(path)


def test_prompts_hold_all_published_problems(shared_data):
    files = sorted((shared_data / "dfs-state-query").glob("*.json"))
    problems = [problem for file in files for problem in json.loads(file.read_text())]
    assert len(problems) == 510
    for problem in problems:
        assert read_prompt("".join(state_prompt(problem))) == (
            problem["graph"],
            problem["start_node"],
            problem["steps"],
        )


@pytest.mark.parametrize("name", ["detail", "small", "100", "300"])
def test_published_files_are_asked_whole_and_their_answers_are_right(shared_data, name):
    path = shared_data / "dfs-state-query" / f"dfs_state_query_{name}.json"
    problems = {problem["id"]: problem for problem in json.loads(path.read_text())}
    task = StateQuery(file=str(path))
    assert task.num_examples == len(problems)
    examples = some_examples(task, material=CHAT, count=task.num_examples)
    assert {example.facts["id"] for example in examples} == set(problems)
    for example in examples:
        problem = problems[example.facts["id"]]
        assert json.loads(example.answer) == problem["answer"]
        assert read_prompt(example.context + example.question)[0] == problem["graph"]
        assert task.score(f"So:\n{example.answer}", example) == 1.0
    steps = [example.facts["steps"] for example in examples]
    assert steps != sorted(steps)
    seldom = StateQuery(file=str(path), steps=12)
    assert seldom.num_examples == steps.count(12) > 0
    assert {example.facts["steps"] for example in some_examples(seldom, count=1)} == {12}


@pytest.mark.parametrize(
    "task", [StateQuery(), StateQuery(nodes=12, steps=23), StateQuery(graph="tree"), StateQuery(steps=59)]
)
def test_problems_of_our_own_are_like_the_published_ones(task):
    examples = some_examples(task, count=40)
    for index, example in enumerate(examples):
        graph, start, steps = read_prompt(example.context + example.question)
        count = len(graph["nodes"])
        assert graph["nodes"] == list(range(count))
        assert count == task.nodes or 10 <= count <= 30
        assert steps == task.steps or 1 <= steps <= 30
        assert start == 0
        assert example.facts == {"id": index, "steps": steps, "nodes": count}
        assert len(graph["edges"]) in ((count - 1,) if task.graph == "tree" else (count - 1, 2 * count))
        state = json.loads(example.answer)
        assert (state["stack"] or [None])[-1] == state["current_node"]
    if task == StateQuery():
        assert len({example.facts["steps"] for example in examples}) > 15
        trees = sum(len(read_prompt(one.context + one.question)[0]["edges"]) < one.facts["nodes"] for one in examples)
        assert 10 <= trees <= 30


def test_the_question_begins_with_the_walk():
    (example,) = some_examples(StateQuery(), material=CHAT, count=1)
    assert example.context.startswith("<user> Here is an undirected graph.")
    assert example.context.endswith("]]\n\n")
    assert example.question.startswith("We walk through it")
    assert example.question.endswith("<assistant> ")
    assert some_examples(StateQuery(), count=1)[0].question.endswith("\nSolution:")


def test_only_the_whole_stack_scores(tmp_path):
    task = StateQuery(file=write(tmp_path, PROBLEM))
    (example,) = some_examples(task, count=1)
    assert task.score('Step 1 ... {"current_node": 2, "stack": [0, 2], "visited_nodes": [0]}', example) == 1.0
    wrong = ["", "[0, 2]", '{"stack": [2, 0]}', '{"stack": [0, 1, 2]}', '{"stack": [0, 2]} no, {"stack": [0, 1]}']
    assert [task.score(output, example) for output in wrong] == [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answer": {"current_node": 1}},
            "entry 1: the answer is not the state after 3 steps, which is .*'stack': .0, 2.",
        ),
        ({"steps": -1}, "entry 1: the answer is not the state"),
        ({"graph": {"nodes": [0]}}, "entry 1 has no 'edges'; it has nodes"),
        ({"graph": {"nodes": [0], "edges": [[0, "1"]]}}, "entry 1: an edge is no pair of whole numbers"),
        ({"steps": "3"}, "entry 1: the field 'steps' has a value of type str"),
    ],
)
def test_malformed_problems_are_refused(tmp_path, change, message):
    task = StateQuery(file=write(tmp_path, PROBLEM | change))
    with pytest.raises(UserError, match=message):
        some_examples(task, count=1)


def test_other_mistakes(tmp_path):
    file = write(tmp_path, PROBLEM)
    with pytest.raises(UserError, match="has 1 examples, and number 2 is wanted"):
        some_examples(StateQuery(file=file), count=2)
    with pytest.raises(UserError, match="has no problem with nodes=0, steps=9"):
        some_examples(StateQuery(file=file, steps=9), count=1)
    with pytest.raises(UserError, match="state_query has a file, whose graphs are as they are"):
        StateQuery(file=file, graph="tree")
    with pytest.raises(UserError, match=r"state_query\(graph\) is ring; it must be one of any, tree, small_world"):
        StateQuery(graph="ring")
    with pytest.raises(UserError, match=r"state_query\(steps\) is 20; .* at most 19"):
        StateQuery(nodes=10, steps=20)
    with pytest.raises(UserError, match=r"state_query\(nodes\) is 4; it must be at least 5"):
        StateQuery(nodes=4)
    with pytest.raises(UserError, match=r"state_query\(tokens=50\) has 50 tokens, and what it holds takes \d+"):
        some_examples(StateQuery(tokens=50), material=MATERIAL, count=1)
