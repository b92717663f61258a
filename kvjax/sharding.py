"""Where arrays live on a mesh: one table from logical axes to mesh axes for parameters, caches and activations."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kvjax._kernels import device_of
from kvjax.errors import UserError

MESH_AXES = ("data", "model")

MESH_AXIS_OF = {
    "B": "data",  # sequences
    "N": "model",  # query heads
    "K": "model",  # key/value heads
    "F": "model",  # feed-forward width
    "V": "model",  # vocabulary
}
"""Logical axis -> mesh axis. A letter that is not here (T, S, D, M, ...) is replicated."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Says how an array with named axes is laid out on a mesh; without a mesh, every method is the identity.

    An axis that its mesh axis does not divide is replicated: a model with 2 key/value heads runs on 8 chips, each
    of which then holds both. Two axes of one array never share a mesh axis; the first one takes it.
    """

    mesh: Mesh | None = None

    @property
    def device(self) -> jax.Device:
        """The first device; without a mesh, the one that JAX runs on."""
        return device_of(self.mesh)

    @property
    def device_kind(self) -> str:
        """Kind of the devices, e.g. "NVIDIA H200"."""
        return self.device.device_kind

    def spec(self, axes: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The partition of an array, e.g. `spec("B T M", (8, 1, 4096))`."""
        letters = axes.split()
        assert len(letters) == len(shape), f"{axes} does not name the axes of shape {shape}"
        if self.mesh is None:
            return PartitionSpec()
        taken: set[str] = set()
        parts: list[str | None] = []
        for letter, size in zip(letters, shape, strict=True):
            mesh_axis = MESH_AXIS_OF.get(letter)
            if mesh_axis in taken or mesh_axis is None or size % self.mesh.shape[mesh_axis]:
                parts.append(None)
            else:
                taken.add(mesh_axis)
                parts.append(mesh_axis)
        return PartitionSpec(*parts)

    def sharding(self, axes: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """The sharding of an array, or None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(axes, shape))

    def constrain(self, array: jax.Array, axes: str) -> jax.Array:
        """Pins an array inside a compiled function to its place."""
        sharding = self.sharding(axes, array.shape)
        return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)

    def put(self, array: jax.Array | np.ndarray, axes: str) -> jax.Array:
        """Moves an array from the host, or from wherever it is, to its place."""
        return jax.device_put(array, self.sharding(axes, array.shape))


def make_mesh(*, data: int = 1, model: int = 1) -> Mesh:
    """Makes the mesh of a run over the devices of this process group.

    Args:
      data: chips over which the sequences of a batch are spread; -1 takes all chips that `model` leaves.
      model: chips over which heads, feed-forward and vocabulary are spread; -1 takes all that `data` leaves.

    Returns:
      A mesh with the axes "data" and "model", whose shardings XLA propagates.

    Raises:
      UserError: the product is more than the devices that are there.
    """
    num_devices = len(jax.devices())
    sizes = [data, model]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = num_devices // known if known > 0 else 0
    num_wanted = math.prod(sizes)
    if min(sizes) < 1 or num_wanted > num_devices:
        raise UserError(
            f"A mesh of data={data}, model={model} does not fit on {num_devices} device(s): "
            f"give two positive sizes whose product is at most {num_devices}, or -1 for one of them."
        )
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:num_wanted])
