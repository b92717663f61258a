"""The public function of the operation, and the choice of its implementation."""

import jax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.select import reference

IMPLEMENTATIONS = ("reference",)


def select(
    scores: Float[Array, "*rows S"],
    *,
    protected: Bool[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    budgets: Int[Array, "*rows"],
    implementation: str | None = None,
) -> Bool[Array, "*rows S"]:
    """The slots of each row that are kept: protected ones first, then by score, then the newest.

    Args:
      scores: float32, higher is kept. -inf is kept only if protected, even where there is room; NaN counts as the
        lowest finite score.
      protected: kept before all others, whatever their score.
      recency: int32, distinct within a row; of equal scores the higher is kept. Negative: an empty slot, never kept.
      budgets: int32, most slots that are kept; may be traced, so that one compilation serves every budget.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.

    Returns:
      True where a slot is kept; at most `budgets` of a row.

    Raises:
      ValueError: the implementation is unknown.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"select has no implementation '{implementation}': give one of {', '.join(IMPLEMENTATIONS)}.")
    with jax.named_scope("select"):
        return reference.select(scores, protected=protected, recency=recency, budgets=budgets)


def chosen_implementation() -> str:
    """The name of what the automatic choice runs."""
    return "reference"
