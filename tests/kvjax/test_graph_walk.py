"""Depth-first walks against all published problems, random graphs, and states read from what a model wrote."""

import json
import math

import numpy as np
import pytest

from kvjax.graph_walk import problem_of, random_tree, read_state, small_world, state_metrics, walk

EDGES = [[3, 0], [0, 1], [1, 2], [2, 0]]


def published(shared_data):
    """All problems; those that say what kind their graph is of, without that."""
    files = sorted((shared_data / "dfs-state-query").glob("*.json"))
    problems = [problem for file in files for problem in json.loads(file.read_text())]
    for problem in problems:
        problem["metadata"].pop("graph_type", None)
    return problems


def test_generated_problems_equal_all_published_ones_given_the_same_graph(shared_data):
    problems = published(shared_data)
    assert len(problems) == 510
    for problem in problems:
        graph, start, steps = problem["graph"], problem["start_node"], problem["steps"]
        assert problem == problem_of(graph["nodes"], graph["edges"], start=start, steps=steps, name=problem["id"])


def test_a_walk_step_by_step():
    assert [(state["action"], state["current_node"], state["stack"]) for state in walk(EDGES, 0)] == [
        ("start", 0, [0]),
        ("visit", 1, [0, 1]),
        ("visit", 2, [0, 1, 2]),
        ("backtrack", 1, [0, 1]),
        ("backtrack", 0, [0]),
        ("visit", 3, [0, 3]),
        ("backtrack", 0, [0]),
        ("backtrack", None, []),
    ]
    assert [state["visited_nodes"] for state in walk(EDGES, 2)][:4] == [[2], [0, 2], [0, 1, 2], [0, 1, 2]]
    assert len(walk([], 5)) == 2


def test_steps_behind_the_end_are_the_last():
    assert problem_of([0, 1], [[0, 1]], start=0, steps=9, name=0)["steps"] == 3


@pytest.mark.parametrize("nodes", [1, 2, 3, 10, 30])
def test_trees_have_one_edge_less_than_nodes_and_are_connected(nodes):
    for seed in range(20):
        edges = random_tree(np.random.default_rng(seed), nodes)
        assert len({tuple(edge) for edge in edges}) == nodes - 1
        assert all(0 <= one < other < nodes for one, other in edges)
        assert edges == sorted(edges)
        assert len(walk(edges, 0)) == 2 * nodes


def test_all_labelled_trees_are_alike_likely():
    """Cayley: 16 of four nodes."""
    drawn = [str(random_tree(np.random.default_rng(seed), 4)) for seed in range(1600)]
    counts = [drawn.count(tree) for tree in set(drawn)]
    assert len(counts) == 16
    assert max(abs(count - 100) for count in counts) < 4.5 * math.sqrt(100)


@pytest.mark.parametrize("nodes", [5, 6, 20])
def test_small_worlds_are_connected_and_have_two_edges_a_node(nodes):
    for seed in range(20):
        edges = small_world(np.random.default_rng(seed), nodes)
        assert len({tuple(edge) for edge in edges}) == 2 * nodes
        assert all(0 <= one < other < nodes for one, other in edges)
        assert len(walk(edges, 0)) == 2 * nodes


def test_a_tenth_of_a_small_world_is_rewired():
    ring = {(one, other) for one in range(100) for other in range(100) if (other - one) % 100 in (1, 2)}
    ring = {tuple(sorted(edge)) for edge in ring}
    far = [len({tuple(edge) for edge in small_world(np.random.default_rng(seed), 100)} - ring) for seed in range(20)]
    assert 0.07 < np.mean(far) / 200 < 0.13
    assert {tuple(edge) for edge in small_world(np.random.default_rng(0), 100, rewired=0.0)} == ring


@pytest.mark.parametrize(
    ("text", "stack"),
    [
        ('{"current_node": 1, "stack": [0, 1], "visited_nodes": [0, 1]}', [0, 1]),
        ('Answer:\n```json\n{\n "stack": [\n0,\n1]\n}\n```\nDone {}.', [0, 1]),
        ('{"stack": [9]} no: {"stack": [0, 1]}', [0, 1]),
        ('{"stack": [0, 1]} as {"note": 1} and {"stack": [NODE, ...]}', [0, 1]),
        ("{'current_node': None, 'stack': []}", []),
        ('{"answer": {"stack": [0, 1]}}', [0, 1]),
        ('{"stack": [0, 1]', None),
        ("stack: [0, 1]", None),
        ("[1]{1}{stack: 1}", None),
        ("{" * 100_000, None),
        ("", None),
    ],
)
def test_the_last_state_of_a_text(text, stack):
    found = read_state(text)
    assert (found and found["stack"]) == stack


RIGHT = {"current_node": 2, "stack": [0, 1, 2], "visited_nodes": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("given", "metrics"),
    [
        (RIGHT, (1, 1, 1, 1, 1, 1, 1)),
        (None, (0, 0, 0, 0, 0, 0, 0)),
        ({**RIGHT, "stack": [0, 3, 2]}, (1, 1, 0, 1, 1, 1, 1)),
        ({**RIGHT, "stack": [0, 1]}, (1, 1, 0, 0, 1, 1, 1)),
        ({**RIGHT, "stack": "0, 1, 2"}, (1, 1, 0, 0, 1, 1, 1)),
        ({**RIGHT, "stack": None, "current_node": "2"}, (1, 0, 0, 0, 1, 1, 1)),
        ({**RIGHT, "visited_nodes": [0, 1, 5, 5]}, (1, 1, 1, 1, 2 / 3, 1 / 2, 4 / 7)),
        ({**RIGHT, "visited_nodes": [[0], "x", True]}, (1, 1, 1, 1, 0, 0, 0)),
        ({"stack": [0, 1, 2]}, (1, 0, 1, 1, 0, 0, 0)),
    ],
)
def test_metrics(given, metrics):
    assert tuple(state_metrics(given, RIGHT).values()) == pytest.approx(metrics)


def test_an_empty_stack_has_no_current_node():
    end = {"current_node": None, "stack": [], "visited_nodes": [0]}
    assert state_metrics(end, end)["current_node"] == state_metrics(end, end)["stack"] == 1.0
    assert state_metrics({"stack": []}, end)["current_node"] == 0.0
