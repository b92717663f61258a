"""Attention of a few query tokens over a cache segment, masked by positions."""

from kernels_pallas.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
