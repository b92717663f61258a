"""The public function of the operation, and the choice of its implementation."""

import jax
from jaxtyping import Array, Int

from kernels_pallas.decode_attention import reference
from kernels_pallas.decode_attention.reference import MASSES, Attended, Segment

IMPLEMENTATIONS = ("reference",)


def decode_attention(
    segments: tuple[Segment, ...],
    *,
    query_positions: Int[Array, "B T"],
    scale: float,
    mass: str | None = None,
    implementation: str | None = None,
) -> tuple[Attended, ...]:
    """Softmax attention of T query tokens over the slots that each may see, one softmax over all segments.

        weight[t, n, s] = softmax_s(scale (q[t, n] . k[s] + bias[t, n]))    over the slots of all segments
        output[t, n]    = sum_s weight[t, n, s] v[s]                        over the slots of one

    A query at position p sees the slots whose position is between 0 and p; a query at position -1 (padding) sees
    nothing and gets zeros. What lies in a slot that no query sees cannot matter, NaN included.

    Args:
      segments: at least one.
      query_positions: `B T` int32; -1 is padding.
      scale: of the scores, D**-0.5.
      mass: one of `MASSES`, what the weights of each slot come to; None leaves it out, and it costs nothing.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.

    Returns:
      Output and weight of each segment, and the mass of its slots if asked for, accumulated in float32.

    Raises:
      ValueError: the implementation or the mass is unknown.
    """
    if mass not in (None, *MASSES):
        raise ValueError(f"decode_attention gives no mass '{mass}': ask for one of {', '.join(MASSES)}.")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"decode_attention has no implementation '{implementation}': give one of {', '.join(IMPLEMENTATIONS)}."
        )
    with jax.named_scope("decode_attention"):
        return reference.decode_attention(segments, query_positions=query_positions, scale=scale, mass=mass)


def chosen_implementation() -> str:
    """The name of what the automatic choice runs."""
    return "reference"
