"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.coded import Coded
from kernels_pallas.slots import mosaic_tpu


@dataclasses.dataclass(frozen=True)
class Case:
    """A round's tokens put into a body.

    Attributes:
      width: of a code in the plane.
      slots: S.
      new: U.
      rows: B.
      heads: K.
      size: R.
    """

    width: int
    slots: int = 2048
    new: int = 128
    rows: int = 8
    heads: int = 8
    size: int = 128

    @property
    def name(self) -> str:
        """Operation, width and slots."""
        return f"slots.put{self.width}.s{self.slots}"

    @property
    def _block(self) -> int:
        return mosaic_tpu.block_of(self.slots * self.width // 8)

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """Times that the loop within a step runs."""
        del device
        return ((self._block // mosaic_tpu.piece_of(self._block),),)

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        plane = jax.ShapeDtypeStruct((self.rows, self.heads, self.slots * self.width // 8, self.size), jnp.int8)
        part = Coded(planes=(plane,), bits=self.width)
        return mosaic_tpu.unsupported((part,), self.new, 1, device) is None

    def step_bytes(self, device: str) -> float:
        """What one step of the grid moves: its bytes twice, and what comes."""
        del device
        return 2.0 * self._block * self.size + self.new * self.size * 2

    def build(self, mesh: Mesh) -> tuple[Callable[..., jax.Array], tuple[jax.ShapeDtypeStruct, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        del mesh
        shape, stored = jax.ShapeDtypeStruct, (self.rows, self.heads)
        plane = shape((*stored, self.slots * self.width // 8, self.size), jnp.int8)
        fields = shape((*stored, self.new, self.size), jnp.uint8)
        slots = shape((*stored, self.new), jnp.int32)
        return functools.partial(mosaic_tpu.put_fields, width=self.width), (plane, fields, slots)


CASES = (*(Case(width) for width in (8, 4, 2, 1)), Case(1, slots=896))
"""Each width that codes are split into, and a plane of which no tile is whole."""
