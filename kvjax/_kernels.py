"""The one door to `kernels_pallas`: arrays in, arrays out."""

from kernels_pallas.coded import Coded, Parts, Rotated, alignment, look_up, pack, read_parts, slice_parts, unpack
from kernels_pallas.decode_attention import Attended, Segment, decode_attention
from kernels_pallas.decode_attention.api import chosen_implementation

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
    "pack",
    "read_parts",
    "slice_parts",
    "unpack",
]


def implementations() -> dict[str, str]:
    """Which implementation of each operation a run uses; goes into the report."""
    return {"decode_attention": chosen_implementation()}
