"""The one door to `kernels_pallas`: arrays in, arrays out."""

from kernels_pallas.coded import Coded, Parts, Rotated, alignment, look_up, pack, read_parts, slice_parts, unpack
from kernels_pallas.decode_attention import Attended, Segment, decode_attention
from kernels_pallas.decode_attention import api as _decode_attention
from kernels_pallas.select import api as _select
from kernels_pallas.select.api import select
from kernels_pallas.slots import api as _slots
from kernels_pallas.slots.api import merge_heads, put_slots, take_slots

__all__ = [
    "Attended",
    "Coded",
    "Parts",
    "Rotated",
    "Segment",
    "alignment",
    "decode_attention",
    "implementations",
    "look_up",
    "merge_heads",
    "pack",
    "put_slots",
    "read_parts",
    "select",
    "slice_parts",
    "take_slots",
    "unpack",
]


def implementations() -> dict[str, str]:
    """Which implementation of each operation a run uses; goes into the report."""
    operations = {"decode_attention": _decode_attention, "select": _select, "slots": _slots}
    return {name: operation.chosen_implementation() for name, operation in operations.items()}
