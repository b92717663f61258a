"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.coded import Coded, Parts, plane_bits
from kernels_pallas.decode_attention import mosaic_floats, mosaic_plan, mosaic_tpu
from kernels_pallas.decode_attention.reference import Segment

_PAGE = 16


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
      form: "table" for codes that stand for levels; "kivi" for keys that share a channel's scale and offset, 32 tokens
        each, and values that share a token's, 32 channels each; "e4m3fn" for floats of 8 bits.
      pages: that are read of each head, 16 slots each; 0 for all slots.
    """

    keys: int
    values: int
    group: int = 8
    slots: int = 16_384
    size: int = 128
    rows: int = 8
    heads: int = 8
    form: str = ""
    pages: int = 0

    @property
    def name(self) -> str:
        """Operation, kind and group."""
        kind = {16: "bf16"}.get(self.keys, f"{'fp' if self.form == 'e4m3fn' else 'int'}{self.keys}")
        kind += f"int{self.values}" if self.keys != self.values else ""
        kind += self.form + ("pages" if self.pages else "")
        return f"decode_attention.{kind}.g{self.group}"

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """Times that loops over heads run, to copy pages and to compute; others are for values of empty slots."""
        plan = self._plan(device)
        if isinstance(plan, mosaic_plan.Plan):
            return ((plan.trips,),)
        copies = ((1, plan.heads),) if self.pages else ()
        loops = plan.together < plan.heads
        return (*copies, (plan.heads // plan.together,)) if loops else copies

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        return mosaic_tpu.unsupported(self.segment(), device) is None

    def step_bytes(self, device: str) -> float:
        """What one step of the grid reads: keys, values, their scales and offsets, and positions, which heads share."""
        plan, segment = self._plan(device), self.segment()
        arrays = jax.tree.leaves((segment.keys, segment.values))
        size = sum(array.size * array.dtype.itemsize for array in arrays)
        positions = 4 * plan.heads if self.pages else 4
        return plan.slots * (plan.heads * size / (self.rows * self.heads * self.slots) + positions)

    def _plan(self, device: str) -> mosaic_plan.Plan | mosaic_floats.Plan:
        return mosaic_tpu.plan_for(self.segment(), 1.0, device)

    def segment(self) -> Segment:
        """Shapes of the arrays."""
        segment = Segment(
            queries=jax.ShapeDtypeStruct((self.rows, 1, self.heads * self.group, self.size), jnp.bfloat16),
            keys=(self._part(self.keys, by_channel=self.form == "kivi"),),
            values=(self._part(self.values),),
            positions=jax.ShapeDtypeStruct((self.rows, 1, self.slots), jnp.int32),
            num_kv_heads=self.heads,
        )
        if not self.pages:
            return segment
        pages = jax.ShapeDtypeStruct((self.rows, self.heads, self.pages), jnp.int32)
        positions = jax.ShapeDtypeStruct((self.rows, self.heads, self.pages * _PAGE), jnp.int32)
        return dataclasses.replace(segment, positions=positions, pages=pages, page=_PAGE)

    def _part(self, bits: int, *, by_channel: bool = False) -> Coded:
        shape, stored, kivi = jax.ShapeDtypeStruct, (self.rows, self.heads), self.form == "kivi"
        if bits == 16:
            return Coded(planes=(shape((*stored, self.slots, self.size), jnp.bfloat16),))
        scale = shape((*stored, self.slots), jnp.float16)
        if kivi:
            own = (self.slots // 32, self.size) if by_channel else (self.size // 32, self.slots)
            scale = shape((*stored, *own), jnp.float16)
        planes = tuple(shape((*stored, self.slots * width // 8, self.size), jnp.int8) for width in plane_bits(bits))
        if self.form == "e4m3fn":
            return Coded(planes=planes, scale=scale, dtype="float8_e4m3fn")
        return Coded(
            planes=planes,
            scale=scale,
            offset=scale if kivi else None,
            bits=bits,
            levels=tuple(float(level) for level in range(1 << bits)) if self.form == "table" else None,
            shift=0.0 if self.form else 0.5,
            token_group=32 if by_channel else 1,
        )

    def build(self, mesh: Mesh) -> tuple[Callable[..., tuple[jax.Array, ...]], tuple[jax.ShapeDtypeStruct, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        segment, position = self.segment(), jax.ShapeDtypeStruct((self.rows, 1), jnp.int32)
        arrays = (segment.queries, segment.keys, segment.values, segment.positions, segment.pages, position)
        return functools.partial(_attend, mesh=mesh), arrays


def _attend(
    queries: jax.Array,
    keys: Parts,
    values: Parts,
    positions: jax.Array,
    pages: jax.Array | None,
    query_positions: jax.Array,
    *,
    mesh: Mesh,
) -> tuple[jax.Array, ...]:
    segment = Segment(
        queries=queries,
        keys=keys,
        values=values,
        positions=positions,
        num_kv_heads=keys[0].num_heads,
        pages=pages,
        page=0 if pages is None else _PAGE,
    )
    return mosaic_tpu.walk(segment, query_positions, queries.shape[3] ** -0.5, mesh=mesh)


CASES = (
    *(Case(keys=bits, values=bits, group=group) for bits in (16, 8, 4, 2) for group in (8, 4, 1)),
    Case(keys=8, values=4),
    Case(keys=4, values=2),
    Case(keys=3, values=3),
    *(Case(keys=bits, values=bits, form="table") for bits in (4, 3, 2)),
    *(Case(keys=bits, values=bits, form="kivi") for bits in (4, 2)),
    Case(keys=8, values=8, form="e4m3fn"),
    *(Case(keys=bits, values=bits, pages=64) for bits in (16, 4)),
)
"""G = 8, 4 and 1 for each kind, keys that have more bits than values, tables, KIVI, floats of 8 bits, and pages."""
