"""Attention of a few query tokens over segments of a cache, masked by positions."""

from kernels_pallas.decode_attention.api import decode_attention
from kernels_pallas.decode_attention.reference import Attended, Segment

__all__ = ["Attended", "Segment", "decode_attention"]
