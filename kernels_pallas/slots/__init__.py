"""Slots of packed codes read out of order, or overwritten, as they lie in memory: codes are moved, never recoded."""

from kernels_pallas.slots.api import IMPLEMENTATIONS, chosen_implementation, merge_heads, put_slots, take_slots

__all__ = ["IMPLEMENTATIONS", "chosen_implementation", "merge_heads", "put_slots", "take_slots"]
