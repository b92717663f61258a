"""Named shapes that the compiler's schedule is measured on."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kernels_pallas.coded import Coded
from kernels_pallas.encode import mosaic_tpu, reference
from kernels_pallas.encode.reference import Integers, Rule, Table


def _half_integers(bits: int) -> Table:
    half = 1 << (bits - 1)
    return Table(levels=tuple((index + 0.5) / half for index in range(-half, half)), shift=0.5, step=1 / half)


def _table(bits: int) -> Table:
    """Any mirrored levels: what they are is nothing to the schedule."""
    half = 1 << (bits - 1)
    upper = [(index + 0.5 + 0.1 * index**2) / half for index in range(half)]
    return Table(levels=(*(-level for level in reversed(upper)), *upper))


RULES: dict[str, Rule] = {
    "int8": Integers(bits=8, symmetric=True),
    "minmax4": Integers(bits=4),
    "half4": _half_integers(4),
    "half2": _half_integers(2),
    "table4": _table(4),
    "table3": _table(3),
    "table2": _table(2),
    "channel2": Integers(bits=2, token_group=32),
    "group2": Integers(bits=2, channel_group=32),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Vectors of a prompt, or those of a round.

    Attributes:
      rule: name, in `RULES`.
      slots: S.
      rows: B.
      heads: K.
      size: D.
      transformed: whether each head's vectors are rotated first.
    """

    rule: str
    slots: int = 8192
    rows: int = 1
    heads: int = 8
    size: int = 128
    transformed: bool = False

    @property
    def name(self) -> str:
        """Operation, rule, tokens, and whether a rotation comes first."""
        return f"encode.{self.rule}.s{self.slots}" + ".rotated" * self.transformed

    def loop_trips(self, device: str) -> tuple[tuple[int, ...], ...]:
        """Times that the loop within a step runs."""
        del device
        blocks = self._blocks()
        count = blocks.heads * blocks.tokens // blocks.piece
        return ((count // mosaic_tpu.unrolled(count),),)

    def _blocks(self) -> mosaic_tpu.Blocks:
        bits = RULES[self.rule].bits
        slots = -(-self.slots // mosaic_tpu.piece_of(bits)) * mosaic_tpu.piece_of(bits)
        return mosaic_tpu.blocks_for(bits, num_slots=slots, num_heads=self.heads, size=self.size)

    def runs_on(self, device: str) -> bool:
        """Whether the kernel serves a kind of device."""
        shape, basis = (self.rows, self.heads, self.slots, self.size), (self.heads, self.size, self.size)
        given = basis if self.transformed else None
        return mosaic_tpu.unsupported(shape, jnp.float32, RULES[self.rule], device, basis=given) is None

    def step_bytes(self, device: str) -> float:
        """What one step of the grid reads and writes: numbers, codes and scales."""
        del device
        blocks, rule = self._blocks(), RULES[self.rule]
        tokens, channels = mosaic_tpu.shared(rule)
        facts = self.size / (tokens if tokens > 1 else channels or self.size)
        facts *= 2 if isinstance(rule, Integers) and not rule.symmetric else 1
        return blocks.heads * blocks.tokens * (self.size * (4 + rule.bits / 8) + 4 * facts)

    def build(self, mesh: Mesh) -> tuple[Callable[..., Coded], tuple[jax.ShapeDtypeStruct, ...]]:
        """A function to compile for the device of a mesh, and the shapes of its arguments."""
        del mesh
        rule = RULES[self.rule]

        def function(numbers: jax.Array, *basis: jax.Array) -> Coded:
            planes, scale, offset = mosaic_tpu.encode(numbers, rule, basis=basis[0] if basis else None)
            return reference.coded(planes, scale, offset, rule)

        numbers = jax.ShapeDtypeStruct((self.rows, self.heads, self.slots, self.size), jnp.float32)
        basis = jax.ShapeDtypeStruct((self.heads, self.size, self.size), jnp.float32)
        return function, (numbers, basis) if self.transformed else (numbers,)


CASES = (
    *(Case(rule) for rule in RULES),
    *(Case(rule, slots=128, rows=8) for rule in ("int8", "half4", "table3")),
    *(Case(rule, transformed=True) for rule in ("half4", "table4")),
)
"""Each rule over a prompt; the tokens of a round; and rotations."""
