"""The glossary: one letter, one meaning, in annotations, einsum strings and comments alike.

| letter | axis |
| --- | --- |
| `B` | sequences (rows of a batch) |
| `T` | new tokens in this call |
| `S` | slots in a cache segment |
| `N` | query heads |
| `K` | key/value heads |
| `k` | heads that are stored, K or fewer where heads share their numbers |
| `G` | query heads per key/value head, N / K |
| `D` | head size |
| `P` | sinks, the first tokens of a sequence |
| `W` | recent window |
| `U` | tokens per round |
| `R` | numbers that are stored of a vector: the rank, or what a codec makes of D |
| `C` | groups of channels with a scale each |
| `f` | bands of RoPE, D / 2 |
| `w` | last queries that a selection looks at |
| `p` | pages of a body |
| `L` | layers |
| `M` | model width |
| `F` | feed-forward width |
| `V` | vocabulary |

`H` is not used: JAX takes it for head size and others for heads. A **slot** is a place in a cache segment, a
**position** is a token's absolute index in its sequence; they are never the same thing once eviction has begun.
"""

from jaxtyping import Array, Float, Int, Key

EMPTY = -1
"""The position of a slot that holds no token, and of a padding token."""

Tokens = Int[Array, "B T"]
FurtherTokens = Int[Array, "B _"]  # behind `Tokens` of another number
Positions = Int[Array, "B T"]
Lengths = Int[Array, "B"]
Activations = Float[Array, "B T M"]
Queries = Float[Array, "B T N D"]
NewKeys = Float[Array, "B T K D"]
NewValues = Float[Array, "B T K D"]
Logits = Float[Array, "B T V"]
LastLogits = Float[Array, "B V"]
RowKeys = Key[Array, "B"]
