"""State query: where a depth-first walk stands after some steps (TriAttention's recursive state query, 2604.04921).

    Nodes: [0, 1, ...] Edges: [[0, 5], ...]        ... the state after 14 steps? ...    {"current_node": 3, ...}

The chain of thought goes down and comes back, and wants neighbours again that nobody has looked at since. Problems are
the published ones (`file=`), or drawn much as their generator draws them: 10 to 30 nodes, trees and small worlds alike
often, any number of steps up to 30 that the walk has. The prompt is worded by us; it holds the same lists and rules.
`dfs` asks the like in symbols.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from kvjax.errors import UserError, check_between, check_choice
from kvjax.graph_walk import problem_of, random_tree, read_state, small_world, state_metrics
from kvjax.records import read_records, record_at, record_field
from kvjax.task import TASKS, Example, Material, Task
from kvjax.words import fitting_prompt

_EXAMPLE = '{"id": 0, "graph": {"nodes": [...], "edges": [...]}, "start_node": 0, "steps": 5, "answer": {...}}'
_FEWEST_NODES, _MOST_NODES, _MOST_STEPS = 10, 30, 30
_GRAPHS = ("any", "tree", "small_world")
_SHUFFLE = 2604


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateQuery(Task):
    """Asks for the state of a depth-first walk.

    Attributes:
      tokens: most of context and question together, chat template included; a problem that takes more is an error.
      new_tokens: most tokens of an answer, chain of thought included; models that think first want more.
      file: published problems, a list of objects; "" to draw graphs. They come in a shuffled order that is always the
        same, since the files are sorted by steps.
      nodes: of the graph, 5 to 200; 0 for as they come. Of a file, only such problems are asked.
      steps: of the walk, 1 to twice the nodes less one; 0 for as they come. Of a file, only such problems are asked.
      graph: "tree", "small_world", or "any" of the two.
    """

    tokens: int = 2048
    new_tokens: int = 1024
    file: str = ""
    nodes: int = 0
    steps: int = 0
    graph: str = "any"

    def __post_init__(self):
        check_between("state_query(new_tokens)", self.new_tokens, 1, 1 << 20)
        check_choice("state_query(graph)", self.graph, _GRAPHS)
        if self.nodes:
            check_between("state_query(nodes)", self.nodes, 5, 200)
        if self.steps or self.nodes:
            check_between("state_query(steps)", self.steps, 0, 2 * (self.nodes or _MOST_NODES) - 1)
        if self.file and self.graph != "any":
            raise UserError("state_query has a file, whose graphs are as they are: leave graph out.")

    @property
    def num_examples(self) -> int | None:
        """Problems of the file that are asked; None without a file."""
        return len(self._problems()) if self.file else None

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        if self.file:
            where, record = record_at(self._problems(), index, self.name)
            problem = _checked(record, where)
        else:
            problem = self._draw(rng, index)
        prompt = fitting_prompt(self, material, *state_prompt(problem), lead="\nSolution:")
        facts = {"id": problem["id"], "steps": problem["steps"], "nodes": len(problem["graph"]["nodes"])}
        return Example(context=prompt[0], question=prompt[1], answer=json.dumps(problem["answer"]), facts=facts)

    def _draw(self, rng: np.random.Generator, index: int) -> dict[str, Any]:
        """A problem like the published ones."""
        fewest = max(_FEWEST_NODES, -(-(self.steps + 1) // 2))
        nodes = self.nodes or int(rng.integers(fewest, _MOST_NODES + 1))
        steps = self.steps or int(rng.integers(1, min(_MOST_STEPS, 2 * nodes - 1) + 1))
        tree = bool(rng.integers(2)) if self.graph == "any" else self.graph == "tree"
        edges = (random_tree if tree else small_world)(rng, nodes)
        return problem_of(range(nodes), edges, start=0, steps=steps, name=index)

    def score(self, output: str, example: Example) -> float:
        """1 for the right stack; `state_metrics` has the other published metrics."""
        return state_metrics(read_state(output), json.loads(example.answer))["stack"]

    def _problems(self) -> tuple:
        records = read_records(self.file, kind="file of problems", example=_EXAMPLE)
        order = np.random.default_rng(_SHUFFLE).permutation(len(records))
        shuffled = tuple(records[one] for one in order)
        wanted = tuple(filter(self._wants, shuffled)) if self.nodes or self.steps else shuffled
        if not wanted:
            raise UserError(f"{self.file} has no problem with nodes={self.nodes}, steps={self.steps} (0 for any).")
        return wanted

    def _wants(self, place: tuple[str, Mapping[str, Any]]) -> bool:
        where, record = place
        nodes = record_field(record_field(record, "graph", dict, where), "nodes", list, where)
        steps = record_field(record, "steps", int, where)
        return self.nodes in (0, len(nodes)) and self.steps in (0, steps)


def state_prompt(problem: Mapping[str, Any]) -> tuple[str, str]:
    """Context and question of a problem in the published format."""
    graph, start, steps = problem["graph"], problem["start_node"], problem["steps"]
    context = (
        "Here is an undirected graph.\n\n"
        f"Nodes: {json.dumps(list(graph['nodes']))}\nEdges: {json.dumps([list(edge) for edge in graph['edges']])}\n\n"
    )
    question = (
        f"We walk through it depth first, from node {start}. Node {start} is visited and is all that the stack holds "
        "before the first step. In each step, look at the node on top of the stack. If it has neighbours that were not "
        "visited yet, visit the one with the smallest number and push it on the stack; else pop the top of the stack. "
        "Every visit is one step, and so is every pop.\n\n"
        f"What is the state after {steps} steps? First list the neighbours of every node in ascending order, then go "
        "through the steps one at a time and write down current node, stack and visited nodes. At the end write the "
        "state as one JSON object, the stack from the start node to the current node, the visited nodes ascending, the "
        "current node null if the stack is empty:\n"
        '{"current_node": NODE, "stack": [NODE, ...], "visited_nodes": [NODE, ...]}'
    )
    return context, question


def _checked(record: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A record of a file; raises `UserError` if something is missing, or its answer is not that of its graph."""
    graph = record_field(record, "graph", dict, where)
    edges = record_field(graph, "edges", list, where)
    if not all(isinstance(edge, list) and [type(node) for node in edge] == [int, int] for edge in edges):
        raise UserError(f"{where}: an edge is no pair of whole numbers.")
    start, steps = (record_field(record, field, int, where) for field in ("start_node", "steps"))
    name = record_field(record, "id", (int, str), where)
    problem = problem_of(record_field(graph, "nodes", list, where), edges, start=start, steps=steps, name=name)
    if steps < 0 or record_field(record, "answer", dict, where) != problem["answer"]:
        raise UserError(f"{where}: the answer is not the state after {steps} steps, which is {problem['answer']}.")
    return problem


TASKS.register("state_query", StateQuery)
