"""The choice of an implementation: the same question and the same words for every operation."""

import dataclasses
from collections.abc import Callable
from typing import Any

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
    return device_of(mesh).device_kind


def device_of(mesh: Mesh | None) -> jax.Device:
    """The first device of a mesh; without one that of `jax.default_device`, or the first one of this process."""
    if mesh is not None:
        return mesh.devices.flat[0]
    said = jax.config.jax_default_device
    return jax.local_devices(backend=said)[0] if said is None or isinstance(said, str) else said


def unspread(mesh: Mesh | None, implementation: str | None) -> str | None:
    """Why a kernel is not chosen where arrays may lie over devices in a way that nobody said.

    None if one device has all, or if an implementation is named: who names it knows.
    """
    count = len(jax.devices())
    wanted = implementation is None and mesh is None and count > 1
    return f"the mesh over {count} devices is not given" if wanted else None


def spread(mesh: Mesh | None, batch: int, heads: int) -> tuple[str | None, str | None]:
    """The axes of a mesh over which sequences and heads lie: "data" and "model", each where it divides them."""
    if mesh is None:
        return None, None
    sizes = {"data": batch, "model": heads}
    return tuple(axis if size % mesh.shape[axis] == 0 else None for axis, size in sizes.items())


def on_each_device(
    function: Callable[..., Any], arrays: tuple[Any, ...], *, mesh: Mesh | None, in_specs: Any, out_specs: Any
) -> Any:
    """What a kernel gives when each device of a mesh, if there is one, runs it on its part of the arrays."""
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    # Kernels say nothing of how their results vary over the mesh, so that is not checked.
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)
