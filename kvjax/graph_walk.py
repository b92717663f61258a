"""Depth-first walks over graphs, step by step, in the format of TriAttention's published problems, and random graphs.

A problem is a dict of id, graph (nodes, edges), start_node, steps, answer and metadata. It asks for the state after a
number of steps: go to the unvisited neighbour of the smallest number, else go back; one visit or one going back is one
step (arXiv 2604.04921, recursive state query; the rules are those of the authors' generator).
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Edges = Sequence[Sequence[int]]

_OBJECT = re.compile(r"\{[^{}]*\}")


def walk(edges: Edges, start: int) -> list[dict[str, Any]]:
    """All states of a walk, from that before the first step to the empty stack.

    Args:
      edges: pairs of nodes, undirected.
      start: the first node.

    Returns:
      Dicts of `current_node` (None at the end), `stack` (from the start on), `visited_nodes` (ascending) and `action`
      ("start", "visit" or "backtrack"); 2n of them, n being the nodes that can be reached.
    """
    neighbours: dict[int, set[int]] = {}
    for one, other in edges:
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    stack, visited, states = [start], {start}, []
    action = "start"
    while True:
        current = stack[-1] if stack else None
        states.append({"current_node": current, "stack": stack[:], "visited_nodes": sorted(visited), "action": action})
        if current is None:
            return states
        unvisited = neighbours.get(current, set()) - visited
        if unvisited:
            stack.append(min(unvisited))
            visited.add(stack[-1])
        else:
            stack.pop()
        action = "visit" if unvisited else "backtrack"


def problem_of(nodes: Sequence[int], edges: Edges, *, start: int, steps: int, name: int | str) -> dict[str, Any]:
    """A problem in the published format; more steps than the walk has are cut to its last."""
    states = walk(edges, start)
    total = len(states) - 1
    state = states[min(steps, total)]
    return {
        "id": name,
        "graph": {"nodes": list(nodes), "edges": [list(edge) for edge in edges]},
        "start_node": start,
        "steps": min(steps, total),
        "answer": {key: state[key] for key in ("current_node", "stack", "visited_nodes")},
        "metadata": {
            "total_dfs_steps": total,
            "graph_nodes": len(nodes),
            "graph_edges": len(edges),
            "action": state["action"],
        },
    }


def random_tree(rng: np.random.Generator, num_nodes: int) -> list[list[int]]:
    """Edges of a tree on nodes 0, 1, ..., every labelled tree as likely as any other (a random Prüfer sequence)."""
    if num_nodes < 2:
        return []
    code = rng.integers(num_nodes, size=num_nodes - 2).tolist()
    degrees = [1 + code.count(node) for node in range(num_nodes)]
    edges = []
    for node in code:
        leaf = degrees.index(1)
        edges.append((leaf, node))
        degrees[leaf] -= 1
        degrees[node] -= 1
    edges.append(tuple(node for node in range(num_nodes) if degrees[node] == 1))
    return _listed(edges)


def small_world(
    rng: np.random.Generator, num_nodes: int, *, neighbours: int = 4, rewired: float = 0.1
) -> list[list[int]]:
    """Edges of a connected small-world graph on nodes 0, 1, ...: a ring, some of its edges rewired.

    Watts and Strogatz, Nature 393 (1998); graphs in pieces are drawn again. A node that has all others for neighbours
    keeps its edge.

    Args:
      rng: decides it.
      num_nodes: more than `neighbours`.
      neighbours: of each node on the ring, half on each side; even.
      rewired: share of edges whose far end goes to a node drawn at random.
    """
    while True:
        around: list[set[int]] = [set() for _ in range(num_nodes)]
        ring = [(node, (node + hop) % num_nodes) for hop in range(1, neighbours // 2 + 1) for node in range(num_nodes)]
        for one, other in ring:
            around[one].add(other)
            around[other].add(one)
        for one, other in ring:
            free = sorted(set(range(num_nodes)) - around[one] - {one})
            if rng.random() < rewired and free:
                new = free[int(rng.integers(len(free)))]
                around[one].remove(other)
                around[other].remove(one)
                around[one].add(new)
                around[new].add(one)
        edges = [(one, other) for one in range(num_nodes) for other in around[one] if one < other]
        if len(walk(edges, 0)) == 2 * num_nodes:
            return _listed(edges)


def _listed(edges: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Edges in order, the smaller node first, as the published lists have them (theirs keep no order within a node)."""
    return sorted(sorted(edge) for edge in edges)


def read_state(text: str) -> Mapping[str, Any] | None:
    """The last JSON object of a text that has a stack; None if there is none.

    Objects in Python's spelling (single quotes, None) are taken too. The authors' scorer takes the first match of a few
    patterns; a model that corrects itself is judged by its last word here.
    """
    for match in reversed(list(_OBJECT.finditer(text))):
        for read in (json.loads, ast.literal_eval):
            try:
                found = read(match[0])
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, dict) and "stack" in found:
                return found
    return None


def state_metrics(given: Mapping[str, Any] | None, expected: Mapping[str, Any]) -> dict[str, float]:
    """The published metrics of a state, each 0 to 1.

    Args:
      given: of `read_state`.
      expected: the right one.

    Returns:
      `parsed`; `current_node`, `stack` (the strict one) and `stack_depth`, right or not; `visited_precision`,
      `visited_recall` and `visited_f1`. All are 0 where nothing was parsed, which the authors leave out of their means.
    """
    names = ("parsed", "current_node", "stack", "stack_depth", "visited_precision", "visited_recall", "visited_f1")
    if given is None:
        return dict.fromkeys(names, 0.0)
    stack = given["stack"]
    visited = given.get("visited_nodes")
    seen = {node for node in visited if _is_node(node)} if isinstance(visited, list) else set()
    right = seen & set(expected["visited_nodes"])
    precision = len(right) / len(seen) if seen else 0.0
    recall = len(right) / len(expected["visited_nodes"])
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    current = given.get("current_node", "none given")
    depth = isinstance(stack, list) and len(stack) == len(expected["stack"])
    values = (True, current == expected["current_node"], stack == expected["stack"], depth, precision, recall, f1)
    return dict(zip(names, map(float, values), strict=True))


def _is_node(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
