"""What all kernels for NVIDIA GPUs share."""

MOST_ELEMENTS = 1 << 31
"""Of an array: what Pallas's Triton counts them with is a signed integer of 32 bits."""


def not_a_gpu(device: str) -> str | None:
    """Why a kernel for NVIDIA GPUs is not chosen on a kind of device; None if it runs there."""
    return None if device.startswith("NVIDIA") else f"it runs on NVIDIA GPUs, and this is {device}"


def power(count: int) -> int:
    """The least power of two that is no less: what blocks are of."""
    return 1 << (count - 1).bit_length()
