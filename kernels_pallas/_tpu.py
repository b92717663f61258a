"""What all kernels for TPUs share."""

LANES = 128
VMEM = 48 * 2**20
"""Bytes that a kernel may take, of the 64 MiB that a core has at least."""


def not_a_tpu(device: str) -> str | None:
    """Why a kernel for TPUs is not chosen on a kind of device; None if it has been compiled for it."""
    if not device.startswith("TPU"):
        return f"it runs on TPUs, and this is {device}"
    return None if device.startswith(("TPU v5", "TPU v6", "TPU7")) else f"it has not been compiled for {device}"
