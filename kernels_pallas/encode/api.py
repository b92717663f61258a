"""The public function of the operation, and the choice of its implementation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, on_each_device, spread, unspread
from kernels_pallas.coded import Coded
from kernels_pallas.encode import mosaic_tpu, reference, triton_gpu
from kernels_pallas.encode.reference import Integers, Rule

IMPLEMENTATIONS = ("mosaic_tpu", "triton_gpu", "reference")
"""Best first."""


def encode(
    numbers: Float[Array, "B K S D"],
    rule: Rule,
    *,
    basis: Float[Any, "... D R"] | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> Coded:
    """Packed codes of numbers, or of what a transform makes of them, with their scales.

        y = x A,    code = the level nearest to y / scale by the rule,    bytes as `coded.pack` has them

    Args:
      numbers: float32 or bfloat16; S is a multiple of 8, and of the tokens that share a scale.
      rule: `Integers` or `Table`.
      basis: A, `D R`, `K D R` or `B K D R`; None for the numbers as they are.
      implementation: a name of `IMPLEMENTATIONS`; None chooses.
      mesh: over which the numbers lie: axis "data" has sequences, "model" heads, each where it divides them. None for
        the device that JAX runs on; with several, None chooses what the compiler can spread itself.

    Returns:
      R numbers a slot. Implementations agree but for numbers within rounding of the middle between two levels.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the numbers.
    """
    matrix = None if basis is None else jnp.asarray(basis, jnp.float32)
    chosen = choose(numbers, rule, basis=matrix, implementation=implementation, mesh=mesh)
    with jax.named_scope("encode"):
        if chosen.name == "reference":
            return reference.encode(numbers, rule, basis=matrix)
        kernel = mosaic_tpu.encode if chosen.name == "mosaic_tpu" else triton_gpu.encode
        function = functools.partial(_on_one, rule=rule, kernel=kernel)
        batch, heads = spread(mesh, *numbers.shape[:2])
        spec, of_basis = PartitionSpec(batch, heads), PartitionSpec()
        if matrix is not None and matrix.ndim > 2:  # `K D R` or `B K D R`
            of_basis = PartitionSpec(*(batch, heads)[4 - matrix.ndim :])
        in_specs = spec, of_basis
        return on_each_device(function, (numbers, matrix), mesh=mesh, in_specs=in_specs, out_specs=spec)


def _on_one(numbers: jax.Array, basis: jax.Array | None, *, rule: Rule, kernel: Callable[..., Any]) -> Coded:
    """What one device does."""
    planes, scale, offset = kernel(numbers, rule, basis=basis)
    return reference.coded(planes, scale, offset, rule)


def choose(
    numbers: Any, rule: Rule, *, basis: Any = None, implementation: str | None = None, mesh: Mesh | None = None
) -> Choice:
    """What encodes numbers: a question of shapes, dtypes and devices alone.

    Args:
      numbers: an array `B K S D`, or its shape and dtype.
      rule: for the codes.
      basis: the transform, or its shape and dtype, or None.
      implementation: the only one that may, or None.
      mesh: as for `encode`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the numbers.
    """
    unsaid, device = unspread(mesh, implementation), device_kind(mesh)
    return choose_for(numbers, rule, device, basis=basis, implementation=implementation, spread=unsaid)


def choose_for(
    numbers: Any,
    rule: Rule,
    device: str,
    *,
    basis: Any = None,
    implementation: str | None = None,
    spread: str | None = None,
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      numbers: an array `B K S D`, or its shape and dtype.
      rule: for the codes.
      device: the kind.
      basis: the transform, or its shape and dtype, or None.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    transform = None if basis is None else basis.shape
    facts = numbers.shape, numbers.dtype, rule, device
    unsupported = {
        "mosaic_tpu": mosaic_tpu.unsupported(*facts, basis=transform) or spread,
        "triton_gpu": triton_gpu.unsupported(*facts, basis=transform) or spread,
        "reference": None,
    }
    return _dispatch.choose("encode", unsupported, implementation=implementation)


def chosen_implementation(mesh: Mesh | None = None) -> str:
    """The name of what the automatic choice runs for numbers with a scale a token on a mesh."""
    numbers = jax.ShapeDtypeStruct((1, 1, 8, 128), jnp.float32)
    return choose(numbers, Integers(bits=8, symmetric=True), mesh=mesh).name
