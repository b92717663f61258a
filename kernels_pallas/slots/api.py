"""The public functions of the operation, and the choice of its implementation."""

import jax
from jaxtyping import Array, Int

from kernels_pallas.coded import Parts
from kernels_pallas.slots import reference
from kernels_pallas.slots.reference import merge_heads

IMPLEMENTATIONS = ("reference",)

__all__ = ["IMPLEMENTATIONS", "chosen_implementation", "merge_heads", "put_slots", "take_slots"]


def take_slots(
    parts: Parts, index: Int[Array, "B K units"], *, unit: int = 1, implementation: str | None = None
) -> Parts:
    """Slots in the order that an index names.

    Args:
      parts: `B k S...`; where k is less than K, the heads that share one agree in their index.
      index: int32, units of `unit` neighbouring slots. Negative: any.
      unit: slots that move together, a multiple of what shares a scale, or a divisor: units then have scales of their
        own.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.

    Returns:
      Parts with `units * unit` slots.

    Raises:
      ValueError: the implementation is unknown, or units cross the borders of groups that share scales.
    """
    _check(implementation)
    with jax.named_scope("take_slots"):
        return reference.take_slots(parts, index, unit=unit)


def put_slots(
    parts: Parts, new: Parts, slots: Int[Array, "B K units"], *, unit: int = 1, implementation: str | None = None
) -> Parts:
    """Slots overwritten with those of `new`; the others stay as they are, and the arrays are updated in place.

    Args:
      parts: `B k S...`; where k is less than K, the heads that share one agree in their slots.
      new: of the same layout, `units * unit` slots.
      slots: int32, where each unit of `new` goes, in units; distinct. Negative: nowhere.
      unit: slots that move together, a multiple of what shares a scale.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.

    Raises:
      ValueError: the implementation is unknown, or units share scales with others.
    """
    _check(implementation)
    with jax.named_scope("put_slots"):
        return reference.put_slots(parts, new, slots, unit=unit)


def _check(implementation: str | None) -> None:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"slots have no implementation '{implementation}': give one of {', '.join(IMPLEMENTATIONS)}.")


def chosen_implementation() -> str:
    """The name of what the automatic choice runs."""
    return "reference"
