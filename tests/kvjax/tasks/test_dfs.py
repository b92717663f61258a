"""Depth-first search, walked again with a stack."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.task import Example
from kvjax.tasks.dfs import Dfs, draw_tree, trace
from tests.puzzles import asked, check_answers, said, some_examples, statements

#        50
#      20  44
#     30 40
CONTEXT = "[NODE]<40>Max[NODE]<20><30><40><65> left[NODE]<44>[NODE]<50><20><44><95> the gate.[NODE]<30>"
ANSWER = "<20><30><40><65><44><95>[END]"
EXAMPLE = Example(context=CONTEXT, question="[DFS]<50>", answer=ANSWER)


def tree_of(context):
    tree = {}
    for node, *below in statements(context, "[NODE]"):
        *tree[node], end = below or [node + 45]
        assert end == node + 45
    return tree


def answer_of(context, question):
    tree = tree_of(context)
    (root,) = asked(question, "[DFS]")
    left, path, steps = {node: list(children) for node, children in tree.items()}, [root], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop(0))
            steps.append(path[-1])
        else:
            done = path.pop()
            steps += [done + 45] if tree[done] else []  # a leaf has no list to end
    return said(steps)


def test_the_walk_is_the_answer():
    check_answers([EXAMPLE, *some_examples(Dfs()), *some_examples(Dfs(tokens=300, nodes=45))], answer_of)


def test_only_the_whole_trace_scores():
    assert Dfs().score(ANSWER, EXAMPLE) == 1.0
    wrong = [
        *("", ANSWER.removesuffix("[END]"), ANSWER.replace("<44><95>", "")),
        ANSWER.replace("<30>", "<35>"),
        "<44><20><30><40><65><95>[END]",  # the right one first
        "<50>" + ANSWER,
    ]
    assert [Dfs().score(answer, EXAMPLE) for answer in wrong] == [0.0] * len(wrong)


def test_the_search_from_below_the_root_stays_below():
    assert trace(tree_of(CONTEXT), 20) == [30, 40, 65]
    assert trace(tree_of(CONTEXT), 44) == []


@pytest.mark.parametrize("nodes", [1, 2, 14, 45])
def test_contexts_hold_a_tree(nodes):
    for example in some_examples(Dfs(tokens=300, nodes=nodes)):
        tree = tree_of(example.context)
        below = [child for children in tree.values() for child in children]
        assert len(tree) == len(statements(example.context, "[NODE]")) == nodes  # each node is listed once
        assert set(tree) - set(below) == set(asked(example.question, "[DFS]"))  # all but the root have a parent
        assert len(below) == nodes - 1  # and one only; that the walk ends says that there is no ring
        assert all(children == sorted(children) and len(children) <= 3 for children in tree.values())
        assert example.facts == {"nodes": nodes}


def depth_of(tree, node):
    return 1 + max((depth_of(tree, child) for child in tree[node]), default=0)


def test_trees_are_deep_and_branch():
    trees = [draw_tree(np.random.default_rng(seed), list(range(20))) for seed in range(40)]
    assert all(depth_of(tree, 0) >= 4 for tree in trees)
    assert all(max(map(len, tree.values())) >= 2 for tree in trees)


@pytest.mark.parametrize("nodes", [0, 46])
def test_refusals(nodes):
    with pytest.raises(UserError, match=rf"dfs\(nodes\) is {nodes}; it must be at least 1 and at most 45"):
        Dfs(nodes=nodes)
