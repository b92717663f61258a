"""KVzip (arXiv 2505.23416): what the model needs to say its prompt again.

After the prompt, the model reads it once more, a chunk at a time, with the first reading in its cache:

    s_j = max over the replayed queries i, and over the group, of softmax_j( q_i . k_j / sqrt(D) )

where the softmax runs over the sinks, the keys of the chunk that is replayed, and the replay itself. Twice the prefill,
and no question need be known. Tokens that come later carry the same number from the queries that followed them: the
largest weight that any query has given them. The authors put a request to repeat before each chunk; here the chunk is
replayed alone, since the library knows no words.
"""

import dataclasses
from typing import ClassVar

from kvjax.errors import check_between
from kvjax.selection import SELECTIONS, Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Selection):
    """Keeps what the model attends to when it reads its prompt again.

    Attributes:
      chunk: tokens that are replayed together.
    """

    numbers: ClassVar[tuple[str, ...]] = ("peak",)

    chunk: int = 2048

    def __post_init__(self):
        check_between("kvzip(chunk)", self.chunk, 1, 1 << 20)

    @property
    def replay(self) -> int:
        """Tokens that are replayed together."""
        return self.chunk

    def score(self, view: View) -> Scores:
        """The largest weight."""
        return view.numbers["peak"]


SELECTIONS.register("kvzip", KVzip)
