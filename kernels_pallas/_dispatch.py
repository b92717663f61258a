"""The choice of an implementation: the same question and the same words for every operation."""

import dataclasses

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs.

    Attributes:
      name: of an implementation.
      reasons: why no better one does, for people; empty if this is the best.
    """

    name: str
    reasons: tuple[str, ...] = ()


def choose(operation: str, unsupported: dict[str, str | None], *, implementation: str | None = None) -> Choice:
    """The first implementation that can serve, or the one that is named.

    Args:
      operation: its name, for messages.
      unsupported: of each implementation, best first, why it cannot serve what is asked; None if it can.
      implementation: the only one that may, or None.

    Raises:
      ValueError: the implementation is unknown, or cannot serve.
    """
    if implementation not in (None, *unsupported):
        known = ", ".join(unsupported)
        raise ValueError(f"{operation} has no implementation '{implementation}': give one of {known}.")
    if implementation is not None:
        reason = unsupported[implementation]
        if reason is not None:
            raise ValueError(f"{operation}: {implementation} cannot serve this: {reason}.")
        return Choice(implementation)
    reasons = []
    for name, reason in unsupported.items():
        if reason is None:
            return Choice(name, tuple(reasons))
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"{operation} has no implementation for this: {'; '.join(reasons)}.")


def device_kind(mesh: Mesh | None) -> str:
    """The kind of the devices of a mesh, or of the one that JAX runs on: "TPU v6 lite", "NVIDIA H200", "cpu"."""
    return (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).device_kind


def unspread(mesh: Mesh | None) -> str | None:
    """Why a kernel is not chosen where arrays may lie over devices in a way that nobody said; None if one has all."""
    count = len(jax.devices())
    return f"the mesh over {count} devices is not given" if mesh is None and count > 1 else None


def not_a_tpu(device: str) -> str | None:
    """Why a kernel for TPUs is not chosen on a kind of device; None if it has been compiled for it."""
    if not device.startswith("TPU"):
        return f"it runs on TPUs, and this is {device}"
    return None if device.startswith(("TPU v5", "TPU v6", "TPU7")) else f"it has not been compiled for {device}"
