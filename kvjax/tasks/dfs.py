"""Depth-first search over a tree, written down as it goes: a long chain of thought whose steps need old facts again.

    [NODE]<a><b><c> ... [NODE]<b><d> ... [NODE]<d> ...     [DFS]<a>     <b><d>[EX]<b><c>[EX]<a>[END]

A step goes to the first child or, where there is none, to the next sibling; where there is neither, [EX] and the parent
say that all below it is done, and its next sibling follows. Children are visited in the order in which they are listed,
which is that of their numbers. After a subtree the list that holds its top is wanted again, which nobody has looked at
since the search went down: TriAttention's recursive state query (arXiv 2604.04921) in symbols. `state_query` asks it in
words, over the published graphs.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, draw_keys, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_MOST_CHILDREN = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dfs(Task):
    """Asks for the trace of a depth-first search.

    Attributes:
      tokens: of context and question together; what nodes and question leave is filler.
      nodes: of the tree.
    """

    symbols: ClassVar[tuple[str, ...]] = SYMBOLS
    stop: ClassVar[str] = "[END]"

    tokens: int = 160
    nodes: int = 14

    def __post_init__(self):
        check_between("dfs(nodes)", self.nodes, 1, NUM_SYMBOLS - NUM_DIGITS)

    @property
    def new_tokens(self) -> int:
        """At most: every node but the root, the returns, two tokens each, from all that have children, and the end."""
        return 3 * self.nodes - 2

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Dfs":
        """Random settings; context, question and answer take at most `tokens`."""
        most = min((tokens + 1) // 6, 40)
        nodes = int(rng.integers(min(3, most), most + 1))
        return cls(tokens=tokens - 3 * nodes + 2, nodes=nodes)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        children = draw_tree(rng, draw_keys(rng, self.nodes))
        pieces = [spell("[NODE]", node, *children[node]) for node in children]
        filler = self.tokens - 2 - (3 * self.nodes - 1)
        check_fits(self, self.tokens - filler)
        root = next(iter(children))
        shuffled = [pieces[one] for one in rng.permutation(len(pieces))]
        return Example(
            context=scatter(shuffled, filler, rng, material.filler),
            question=spell("[DFS]", root),
            answer=spell(*trace(children, root), "[END]"),
            facts={"nodes": self.nodes},
        )

    def score(self, output: str, example: Example) -> float:
        """1 for the whole trace, to the letter."""
        return float(output == example.answer)


def draw_tree(rng: np.random.Generator, keys: list[int]) -> dict[int, list[int]]:
    """A random tree: node -> its children, ascending; the first key is the root."""
    children: dict[int, list[int]] = {key: [] for key in keys}
    for place, key in enumerate(keys[1:], start=1):
        open_nodes = [parent for parent in keys[:place] if len(children[parent]) < _MOST_CHILDREN]
        # The newest nodes are preferred, so that trees are deep enough for something to lie dormant.
        children[open_nodes[-1 - min(int(rng.exponential(2.0)), len(open_nodes) - 1)]].append(key)
    return {key: sorted(below) for key, below in children.items()}


def trace(children: dict[int, list[int]], node: int) -> list[str | int]:
    """The steps of a depth-first search from a node whose children are still to be visited; none below a leaf."""
    steps = [step for child in children[node] for step in (child, *trace(children, child))]
    return [*steps, "[EX]", node] if steps else []


TASKS.register("dfs", Dfs)
