"""The public functions of the operation, and the choice of its implementation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, on_each_device, spread, unspread
from kernels_pallas.coded import Coded, Parts
from kernels_pallas.slots import mosaic_tpu, reference, triton_gpu
from kernels_pallas.slots.reference import merge_heads

IMPLEMENTATIONS = ("mosaic_tpu", "triton_gpu", "reference")
"""Best first."""

__all__ = ["IMPLEMENTATIONS", "choose_put", "chosen_implementation", "merge_heads", "put_slots", "take_slots"]


def take_slots(
    parts: Parts, index: Int[Array, "B K units"], *, unit: int = 1, implementation: str | None = None
) -> Parts:
    """Slots in the order that an index names.

    Args:
      parts: `B k S...`; where k is less than K, the heads that share one agree in their index.
      index: int32, units of `unit` neighbouring slots. Negative: any.
      unit: slots that move together, a multiple of what shares a scale, or a divisor above 1: units then have scales
        of their own. All that are taken fill whole bytes.
      implementation: "reference", which alone takes; None chooses it.

    Returns:
      Parts with `units * unit` slots.

    Raises:
      ValueError: the implementation is unknown or does not take, or units cross the borders of groups that share
        scales.
    """
    puts = "it puts, and does not take"
    unsupported = {"mosaic_tpu": puts, "triton_gpu": puts, "reference": None}
    _dispatch.choose("slots", unsupported, implementation=implementation)
    with jax.named_scope("take_slots"):
        return reference.take_slots(parts, index, unit=unit)


def put_slots(
    parts: Parts,
    new: Parts,
    slots: Int[Array, "B K units"],
    *,
    unit: int = 1,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Parts:
    """Slots overwritten with those of `new`; the others stay as they are, and the arrays are updated in place.

    Args:
      parts: `B k S...`; where k is less than K, the heads that share one agree in their slots.
      new: of the same layout, `units * unit` slots.
      slots: int32, where each unit of `new` goes, in units; distinct. Negative: nowhere.
      unit: slots that move together, a multiple of what shares a scale.
      implementation: a name of `IMPLEMENTATIONS`; None chooses. The kernels write packed codes, and leave what is
        stored as floats, scales among it, to the reference.
      mesh: over which the arrays lie: axis "data" has sequences, "model" heads, each where it divides them. None for
        the device that JAX runs on; with several, None chooses what the compiler can spread itself.

    Raises:
      ValueError: the implementation is unknown or cannot serve the parts, or units share scales with others.
    """
    chosen = choose_put(parts, slots.shape[2], unit=unit, implementation=implementation, mesh=mesh)
    known = {"mosaic_tpu": mosaic_tpu, "triton_gpu": triton_gpu}
    kernel = known.get(chosen.name)
    put_fields = None if kernel is None else functools.partial(_put_fields, kernel=kernel, mesh=mesh)
    with jax.named_scope("put_slots"):
        return reference.put_slots(parts, new, slots, unit=unit, put_fields=put_fields)


def _put_fields(*arrays: jax.Array, kernel: Any, width: int, mesh: Mesh | None) -> jax.Array:
    """A kernel's `put_fields`, on each device for what that has: plane, fields and slots are all `B k ...`."""
    spec = PartitionSpec(*spread(mesh, *arrays[0].shape[:2]))
    put = functools.partial(kernel.put_fields, width=width)
    return on_each_device(put, arrays, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)


def choose_put(
    parts: Parts, num_new: int, *, unit: int = 1, implementation: str | None = None, mesh: Mesh | None = None
) -> Choice:
    """What overwrites slots: a question of shapes, dtypes and devices alone.

    Args:
      parts: arrays, or their shapes.
      num_new: units that come.
      unit: slots that move together.
      implementation: the only one that may, or None.
      mesh: as for `put_slots`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the parts.
    """
    unsaid, device = unspread(mesh, implementation), device_kind(mesh)
    return choose_put_for(parts, num_new, device, unit=unit, implementation=implementation, spread=unsaid)


def choose_put_for(
    parts: Parts,
    num_new: int,
    device: str,
    *,
    unit: int = 1,
    implementation: str | None = None,
    spread: str | None = None,
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      parts: arrays, or their shapes.
      num_new: units that come.
      device: the kind.
      unit: slots that move together.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    unsupported = {
        "mosaic_tpu": mosaic_tpu.unsupported(parts, num_new, unit, device) or spread,
        "triton_gpu": triton_gpu.unsupported(parts, num_new, unit, device) or spread,
        "reference": None,
    }
    return _dispatch.choose("slots", unsupported, implementation=implementation)


def chosen_implementation(mesh: Mesh | None = None) -> str:
    """The name of what the automatic choice puts single slots of codes with on a mesh."""
    codes = Coded(planes=(jax.ShapeDtypeStruct((1, 1, 128, 128), jnp.int8),), bits=8)
    return choose_put((codes,), 1, mesh=mesh).name
