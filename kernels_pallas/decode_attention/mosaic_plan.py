"""How `mosaic_codes` cuts a segment, and the codes of a byte."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from kernels_pallas._tpu import LANES
from kernels_pallas.coded import Coded

_ROWS_OF_TILES = 512  # (heads a step) (tiles of 128 slots) (tiles of 8 rows): length of the unrolled program
_BLOCK_SLOTS = {8: 2048, 4: 4096, 2: 8192}  # with eight heads: 2 MiB of keys
BITS = tuple(_BLOCK_SLOTS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the kernel's body is written for.

    Attributes:
      key_bits: of a code.
      value_bits: as many, or fewer.
      slots: S of a block.
      heads: stored heads of a step.
      beside: heads that share a pass through the matrix unit, 2 where it is twice as wide as a head.
      chunk: rows of bytes that go through it together.
      rows: Q, a multiple of 8.
      num_slots: of the segment.
      key_width: D of the keys.
      value_width: of the values.
      key_levels: bytes that codes stand for, lowest code first; None if they stand for themselves.
      value_levels: the same.
      key_step: what a level of the table is multiplied with.
      value_step: the same.
      key_shift: see `Coded.shift`.
      value_shift: see `Coded.shift`.
      biased: whether rows have a bias.
      one_position: whether all queries of a row see the same slots.
    """

    key_bits: int
    value_bits: int
    slots: int
    heads: int
    beside: int
    chunk: int
    rows: int
    num_slots: int
    key_width: int
    value_width: int
    key_levels: tuple[int, ...] | None
    value_levels: tuple[int, ...] | None
    key_step: float
    value_step: float
    key_shift: float
    value_shift: float
    biased: bool
    one_position: bool

    @property
    def tiles(self) -> int:
        """Of 128 slots, in a block."""
        return self.slots // LANES

    @property
    def trips(self) -> int:
        """Of the loop over heads: the first two turns of its pipeline and the last two are outside of it."""
        return max(self.heads // self.beside - 2, 0)


def classes(bits: int) -> int:
    """n, codes of a byte."""
    return 8 // bits


def least_slots(bits: int) -> int:
    """Slots whose bytes fill a tile."""
    return LANES * classes(bits)


def as_bytes(levels: tuple[float, ...] | None) -> tuple[tuple[int, ...] | None, float]:
    """Levels as integers of 8 bits times a step: of all steps that use most of a byte, the one that is off least."""
    if levels is None:
        return None, 1.0
    largest = max(map(abs, levels))

    def error(step: float) -> float:
        return sum((level - step * round(level / step)) ** 2 for level in levels)

    step = min((largest / most for most in range(96, 128)), key=error)
    return tuple(round(level / step) for level in levels), step


def plan_for(
    keys: Coded, values: Coded, *, rows: int, biased: bool, one_position: bool, wide: bool, num_slots: int
) -> Plan:
    """Blocks that are long enough to hide a step's start, in a program of bounded length.

    Args:
      keys: `B k S D`.
      values: `B k S V`.
      rows: Q.
      biased: whether queries have a bias.
      one_position: whether all queries of a row see the same slots.
      wide: whether the matrix unit is 256 wide, and not 128.
      num_slots: S.
    """
    widths = (keys.planes[0].shape[3], values.planes[0].shape[3])
    (key_levels, key_step), (value_levels, value_step) = (as_bytes(part.levels) for part in (keys, values))
    heads = math.gcd(keys.num_heads, 8) if keys.num_heads > 8 else keys.num_heads
    least = least_slots(values.bits)
    slots = _BLOCK_SLOTS[keys.bits] * min(8 // heads, 2) * LANES // max(LANES, *widths)  # more takes minutes to compile
    slots = min(slots, _ROWS_OF_TILES * LANES * 8 // (heads * rows), -(-num_slots // least) * least)
    slots = max(slots // least, 1) * least
    chunk = 2 * LANES if wide and slots % (2 * least) == 0 else LANES
    beside = 2 if wide and heads % 2 == 0 and widths == (LANES, LANES) else 1
    return Plan(
        key_bits=keys.bits,
        value_bits=values.bits,
        slots=slots,
        heads=heads,
        beside=beside,
        chunk=chunk,
        rows=rows,
        num_slots=num_slots,
        key_width=widths[0],
        value_width=widths[1],
        key_levels=key_levels,
        value_levels=value_levels,
        key_step=key_step,
        value_step=value_step,
        key_shift=keys.shift,
        value_shift=values.shift,
        biased=biased,
        one_position=one_position,
    )


def last_live(row: jax.Array, block: jax.Array, live: jax.Ref) -> jax.Array:
    """The block of a sequence, or the last one that is alive: it is there already, and is not fetched again."""
    return jnp.minimum(block, jnp.maximum(live[row] - 1, 0))
