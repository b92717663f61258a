"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.coded import Coded, Parts
from kernels_pallas.decode_attention import mosaic_floats, mosaic_plan, mosaic_tpu
from kernels_pallas.decode_attention.reference import Segment


@dataclasses.dataclass(frozen=True)
class Case:
    """One token a row over a long segment of one kind.

    Attributes:
      keys: bits of codes at half-integers with a scale a token; 16 is bfloat16.
      values: the same.
      group: G, query heads of a key/value head.
      slots: S.
      size: D.
      rows: B.
      heads: K.
      table: whether codes stand for levels of a table.
    """

    keys: int
    values: int
    group: int = 8
    slots: int = 16_384
    size: int = 128
    rows: int = 8
    heads: int = 8
    table: bool = False

    @property
    def name(self) -> str:
        """Operation, kind and group."""
        kind = "bf16" if self.keys == 16 else f"int{self.keys}"
        kind += f"int{self.values}" if self.keys != self.values else ""
        kind += "table" if self.table else ""
        return f"decode_attention.{kind}.g{self.group}"

    @property
    def loop_trips(self) -> tuple[int, ...]:
        """Loops within a step are for values of empty slots."""
        return ()

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        return mosaic_tpu.unsupported(self.segment(), device) is None

    def step_bytes(self) -> int:
        """What one step of the grid reads: keys, values, their scales, and positions, which heads share."""
        padded = -(-self.group // 8) * 8
        if self.keys == 16:
            plan = mosaic_floats.plan_for(jnp.bfloat16, rows=padded, num_slots=self.slots, num_heads=self.heads)
            return plan.slots * (plan.heads * self.size * 4 + 4)
        segment = self.segment()
        plan = mosaic_plan.plan_for(
            segment.keys[0],
            segment.values[0],
            rows=padded,
            biased=False,
            one_position=True,
            wide=True,
            num_slots=self.slots,
        )
        return plan.slots * (plan.heads * (self.size * (self.keys + self.values) // 8 + 4) + 4)

    def segment(self) -> Segment:
        """Shapes of the arrays."""
        shape, stored = jax.ShapeDtypeStruct, (self.rows, self.heads)

        def part(bits: int) -> Parts:
            if bits == 16:
                return (Coded(planes=(shape((*stored, self.slots, self.size), jnp.bfloat16),)),)
            plane = shape((*stored, self.slots * bits // 8, self.size), jnp.int8)
            scale = shape((*stored, self.slots), jnp.float16)
            levels = tuple(float(level) for level in range(1 << bits)) if self.table else None
            return (Coded(planes=(plane,), scale=scale, bits=bits, levels=levels, shift=0.0 if self.table else 0.5),)

        return Segment(
            queries=shape((self.rows, 1, self.heads * self.group, self.size), jnp.bfloat16),
            keys=part(self.keys),
            values=part(self.values),
            positions=shape((self.rows, 1, self.slots), jnp.int32),
            num_kv_heads=self.heads,
        )

    def build(self, mesh: Mesh) -> tuple[Callable[..., tuple[jax.Array, ...]], tuple[jax.ShapeDtypeStruct, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        segment, position = self.segment(), jax.ShapeDtypeStruct((self.rows, 1), jnp.int32)
        arrays = (segment.queries, segment.keys, segment.values, segment.positions, position)
        return functools.partial(_attend, mesh=mesh), arrays


def _attend(
    queries: jax.Array,
    keys: Parts,
    values: Parts,
    positions: jax.Array,
    query_positions: jax.Array,
    *,
    mesh: Mesh,
) -> tuple[jax.Array, ...]:
    segment = Segment(queries=queries, keys=keys, values=values, positions=positions, num_kv_heads=keys[0].num_heads)
    return mosaic_tpu.walk(segment, query_positions, queries.shape[3] ** -0.5, mesh=mesh)


CASES = tuple(Case(keys=bits, values=bits, group=group) for bits in (16, 8, 4, 2) for group in (8, 4, 1)) + (
    Case(keys=8, values=4),
    Case(keys=4, values=2),
    Case(keys=4, values=4, table=True),
    Case(keys=2, values=2, table=True),
)
"""G = 8, 4 and 1 for each kind, keys that have more bits than values, and tables."""
