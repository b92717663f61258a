"""Depth-first search over a tree, written down as it goes: a long chain of thought whose steps need old facts again.

    [NODE]<a><b><c><A> ... [NODE]<b><d><B> ... [NODE]<d> ...     [DFS]<a>     <b><d><B><c><A>[END]

Lists are open and closed like brackets: symbol <B> closes what <b> opened, 45 numbers below. A step goes to the first
child or, where there is none, to what follows the node in the list that holds it: the next sibling, or the end of the
list, which says that all below its node is done; what follows that node in its own parent's list is next. Children are
listed and visited in the order of their numbers. After a subtree the list that holds its top is wanted again, which
nobody has looked at since the search went down: TriAttention's recursive state query (arXiv 2604.04921) in symbols.
`state_query` asks it in words, over the published graphs.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from kvjax.errors import check_between
from kvjax.symbols import NUM_DIGITS, NUM_SYMBOLS, SYMBOLS, num_tokens, scatter, spell
from kvjax.task import TASKS, Example, Material, Task, check_fits

_MOST_CHILDREN = 3
_PAIRS = (NUM_SYMBOLS - NUM_DIGITS) // 2


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
        check_between("dfs(nodes)", self.nodes, 1, _PAIRS)

    @property
    def new_tokens(self) -> int:
        """At most: every node but the root, an end of a list for each that is no leaf, and the end."""
        return 2 * self.nodes - 1

    @classmethod
    def sized(cls, rng: np.random.Generator, tokens: int) -> "Dfs":
        """Random settings; context, question and answer take at most `tokens`."""
        most = min((tokens + 1) // 6, 40)
        nodes = int(rng.integers(min(3, most), most + 1))
        return cls(tokens=tokens - 2 * nodes + 1, nodes=nodes)

    def example(self, rng: np.random.Generator, material: Material, *, index: int = 0, more: int = 0) -> Example:
        """See `Task`."""
        children = draw_tree(rng, (NUM_DIGITS + rng.permutation(_PAIRS)[: self.nodes]).tolist())
        check_fits(self, 4 * self.nodes)  # of a chain, which has most lists
        pieces = [statement(node, below) for node, below in children.items()]
        root = next(iter(children))
        shuffled = [pieces[one] for one in rng.permutation(len(pieces))]
        filler = self.tokens - 2 - sum(map(num_tokens, pieces))
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


def closing(node: int) -> int:
    """The symbol that ends a node's list."""
    return node + _PAIRS


def statement(node: int, below: list[int]) -> str:
    """What a context says of a node: its children, if it has some, and the end of the list."""
    return spell("[NODE]", node, *below, *([closing(node)] if below else []))


def trace(children: dict[int, list[int]], node: int) -> list[int]:
    """The steps of a depth-first search from a node on, itself not named; none from a leaf."""
    steps = [step for child in children[node] for step in (child, *trace(children, child))]
    return [*steps, closing(node)] if steps else []


TASKS.register("dfs", Dfs)
