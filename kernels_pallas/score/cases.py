"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas._dispatch import device_kind
from kernels_pallas.coded import Coded, plane_bits
from kernels_pallas.decode_attention import mosaic_floats
from kernels_pallas.score import mosaic_tpu
from kernels_pallas.score.reference import StoredKeys


@dataclasses.dataclass(frozen=True)
class Case:
    """Both terms over a long segment of one kind, its tokens each head's own.

    Attributes:
      bits: of codes at half-integers, or of a table, with a scale a token; 16 is bfloat16.
      group: G.
      rotated: whether keys are stored rotated, all heads alike.
      table: whether codes stand for levels.
      slots: S.
      size: D.
      rows: B.
      heads: K.
    """

    bits: int
    group: int = 4
    rotated: bool = True
    table: bool = False
    slots: int = 16_384
    size: int = 128
    rows: int = 8
    heads: int = 8

    @property
    def name(self) -> str:
        """Operation, kind, group, and whether there is a rotation."""
        kind = "bf16" if self.bits == 16 else f"int{self.bits}" + "table" * self.table
        return f"score.{kind}.g{self.group}" + ".rotated" * self.rotated

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """Times that the loop over heads runs."""
        plan = self._plan(device)
        return ((plan.heads // plan.together,),) if plan.together < plan.heads else ()

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        return mosaic_tpu.unsupported(self.keys(), self.heads * self.group, device) is None

    def step_bytes(self, device: str) -> float:
        """What one step of the grid reads and writes: keys, scales and positions, and scores."""
        plan = self._plan(device)
        arrays = jax.tree.leaves((self.keys().parts, self.keys().positions))
        size = sum(array.size * array.dtype.itemsize for array in arrays) / (self.rows * self.heads * self.slots)
        return plan.slots * plan.heads * (size + 4 * self.group)

    def _plan(self, device: str) -> mosaic_floats.Plan:
        return mosaic_tpu.plan_for(self.keys(), self.heads * self.group, device)

    def keys(self) -> StoredKeys:
        """Shapes of the arrays."""
        shape, stored = jax.ShapeDtypeStruct, (self.rows, self.heads)
        if self.bits == 16:
            part = Coded(planes=(shape((*stored, self.slots, self.size), jnp.bfloat16),))
        else:
            part = Coded(
                planes=tuple(
                    shape((*stored, self.slots * width // 8, self.size), jnp.int8) for width in plane_bits(self.bits)
                ),
                scale=shape((*stored, self.slots), jnp.float16),
                bits=self.bits,
                levels=tuple(float(level) for level in range(1 << self.bits)) if self.table else None,
                shift=0.0 if self.table else 0.5,
            )
        return StoredKeys(
            parts=(part,),
            positions=shape((*stored, self.slots), jnp.int32),
            num_kv_heads=self.heads,
            basis=shape((self.size, self.size), jnp.float32) if self.rotated else None,
        )

    def build(self, mesh: Mesh) -> tuple[Callable[..., jax.Array], tuple[Any, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        heads, device = self.heads * self.group, device_kind(mesh)

        def function(keys: StoredKeys, rows: jax.Array, weights: jax.Array) -> jax.Array:
            return mosaic_tpu.score(keys, rows, weights, device=device)

        rows = jax.ShapeDtypeStruct((self.rows, heads, self.size), jnp.float32)
        weights = jax.ShapeDtypeStruct((1, heads, self.size // 2), jnp.float32)
        return function, (self.keys(), rows, weights)


CASES = (
    *(Case(4, group=group) for group in (4, 8)),
    Case(4, table=True),
    *(Case(16, group=group, rotated=False) for group in (4, 8)),
)
"""Rotated codes of 4 bits, as TurboQuant's; and what is evicted and not coded."""
