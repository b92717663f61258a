"""The one door to `kernels_pallas`: arrays in, arrays out."""

from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.decode_attention.api import chosen_implementation

__all__ = ["decode_attention", "implementations"]


def implementations() -> dict[str, str]:
    """Which implementation of each operation a run uses; goes into the report."""
    return {"decode_attention": chosen_implementation()}
