"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.select import mosaic_tpu


@dataclasses.dataclass(frozen=True)
class Case:
    """Many rows of one length.

    Attributes:
      slots: S.
      rows: of all layers and heads.
    """

    slots: int
    rows: int = 256

    @property
    def name(self) -> str:
        """Operation and slots."""
        return f"select.s{self.slots}"

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """Bits, and pieces of a long row in each; the second search runs only where keys tie."""
        del device
        return ((32, mosaic_tpu.pieces(mosaic_tpu.rows_for(self.rows, self.slots), self.slots)),)

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        return mosaic_tpu.unsupported((self.rows, self.slots), device) is None

    def step_bytes(self, device: str) -> float:
        """What one step of the grid reads: keys and ages."""
        del device
        return mosaic_tpu.rows_for(self.rows, self.slots) * self.slots * 8.0

    def build(self, mesh: Mesh) -> tuple[Callable[..., tuple[jax.Array, ...]], tuple[jax.ShapeDtypeStruct, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        del mesh
        keys, ages, wanted = (
            jax.ShapeDtypeStruct((self.rows, width), dtype)
            for width, dtype in ((self.slots, jnp.uint32), (self.slots, jnp.int32), (1, jnp.int32))
        )
        return mosaic_tpu.thresholds, (keys, ages, wanted)


CASES = (Case(2176), Case(16_384), Case(131_072, rows=64))
"""A budget of 2,048 and a round of tokens, a long prompt, and one that a loop goes over."""
