"""The public function of the operation, and the choice of its implementation."""

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.decode_attention import reference

IMPLEMENTATIONS = ("reference",)


def decode_attention(
    queries: Float[Array, "B T N D"],
    keys: Float[Array, "B K S D"],
    *,
    values: Float[Array, "B K S D"],
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    implementation: str | None = None,
) -> Float[Array, "B T N D"]:
    """Softmax attention of T query tokens over the slots that each may see.

    A query at position p sees the slots whose position is between 0 and p; a query at position -1 (padding) sees
    nothing and gets zeros. Scores are scaled by D**-0.5. Query head n reads key/value head n // (N / K).

    Args:
      queries: `B T N D`, rotated.
      keys: `B K S D`, rotated. What lies in a slot at position -1 cannot matter, NaN included.
      values: `B K S D`.
      query_positions: `B T` int32; -1 is padding.
      key_positions: `B S` int32; -1 is an empty slot. The order of slots is free.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.

    Returns:
      `B T N D` in the dtype of the queries, accumulated in float32.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"decode_attention has no implementation '{implementation}': give one of {', '.join(IMPLEMENTATIONS)}."
        )
    with jax.named_scope("decode_attention"):
        return reference.decode_attention(
            queries, keys, values=values, query_positions=query_positions, key_positions=key_positions
        )


def chosen_implementation() -> str:
    """The name of what the automatic choice runs."""
    return "reference"
