"""Pages of a segment on a TPU: `mosaic_floats` cuts them out of memory by copies of its own.

    step n          computes on one half of a buffer, while into the other one go
    step n + 1      its pages: for each head and page a copy of each plane

Planes of codes or floats, which are nearly all bytes, stay as they are stored. What is small XLA gathers before:
positions, scales and offsets. A copy takes a unit, which is a page or what of it fits into blocks. Memory is tiled by
8 rows of words, but libtpu cuts single rows of words out of a tile: 4 rows of bytes, 2 of bfloat16.

To start a copy takes 4 to 7 cycles, for short codes longer than to read its bytes; XLA's gather takes 9 to 11, and what
it has gathered is read again.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from kernels_pallas._tpu import LANES, ROWS
from kernels_pallas.coded import Parts
from kernels_pallas.decode_attention.reference import Segment
from kernels_pallas.slots.reference import finer, take_slots

if TYPE_CHECKING:
    from kernels_pallas.decode_attention.mosaic_floats import Plan
    from kernels_pallas.decode_attention.mosaic_floats_body import Step

_MOST_BYTES = 1 << 19  # of a list, half of what a core has for numbers that say where things are
_ABREAST = 64  # units whose copies are written out one after the other


def unsupported(segment: Segment, plan: "Plan") -> str | None:
    """Why the pages of a segment cannot be cut out; None if they can.

    Args:
      segment: with pages; arrays, or their shapes.
      plan: for it.
    """
    if segment.owners is not None:
        return "a pool has pages"
    if segment.pages.shape[1] != segment.keys[0].num_heads:
        return "pages are not of as many heads as keys and values"
    for layout in plan.parts.values():
        if layout.size % LANES:
            return f"keys or values have pages and {layout.size} numbers, which lie with slots on lanes"
        if layout.token_group % ROWS and layout.token_group > 1:
            group = layout.token_group
            return f"keys or values have pages whose scales are of {group} tokens, and not of a multiple of {ROWS}"
        rows = [plan.unit * width for width in layout.widths]
        if any(row % (32 // jnp.dtype(layout.dtype).itemsize if layout.plain else 32) for row in rows):
            return f"keys or values have pages of {segment.page} slots, which do not fill words"
    size = 4 * segment.pages.shape[0] * segment.pages.shape[1] * plan.num_blocks * (plan.slots // plan.unit)
    return f"there are {size:,} bytes of pages, more than {_MOST_BYTES:,}" if size > _MOST_BYTES else None


def shaped(parts: Parts, page: int) -> Parts:
    """Parts whose groups of tokens are no longer than a page; their scales are not cut yet."""
    return tuple(finer(part, page) for part in parts)


def with_scales(parts: Parts, segment: Segment) -> Parts:
    """Parts with the scales and offsets of a segment's pages alone; the planes are all that is stored."""
    taken = take_slots(parts, segment.pages, unit=segment.page)
    return tuple(dataclasses.replace(one, planes=part.planes) for one, part in zip(taken, parts, strict=True))


def fitted(plan: "Plan", page: int, *, one_core: bool) -> "Plan":
    """A plan with blocks of about equal length, as all of a block is copied, and the unit of copies.

    Rows of a copy are whole tiles, or as many as divide one.
    """
    slots = -(-plan.num_slots // plan.num_blocks)
    multiple = math.lcm(plan.multiple, ROWS)
    slots = plan.slots if plan.num_blocks == 1 else -(-slots // multiple) * multiple
    unit = math.gcd(page, slots)
    unit = unit if unit % _slots_of_tiles(plan) == 0 else unit & -unit
    return dataclasses.replace(plan, slots=slots, unit=unit, one_core=one_core)


def _slots_of_tiles(plan: "Plan") -> int:
    """Slots that are whole tiles of every plane: of 32 rows of bytes, 16 of bfloat16 or 8 of float32."""
    layouts = plan.parts.values()
    plain = [32 // jnp.dtype(one.dtype).itemsize for one in layouts if one.plain]
    return math.lcm(*plain, *(32 * 8 // width for one in layouts if not one.plain for width in one.widths))


def units_of(segment: Segment, plan: "Plan") -> Int[Array, "_"]:
    """Where in memory the units of all sequences, heads and blocks are; those of no page at some other's place."""
    parts, last = segment.page // plan.unit, segment.keys[0].num_slots // segment.page - 1
    units = jnp.clip(segment.pages, 0, last)[..., None] * parts + jnp.arange(parts, dtype=jnp.int32)[None, None, None]
    units = units.reshape(*segment.pages.shape[:2], -1)
    padding = plan.num_blocks * (plan.slots // plan.unit) - units.shape[2]
    return jnp.pad(units, [(0, 0), (0, 0), (0, padding)]).reshape(-1)


def buffers(plan: "Plan", inputs: dict[str, Any]) -> dict[str, Any]:
    """Fast memory for two steps' pages, and what counts the bytes that have come."""
    found = {}
    for name, (array, _) in inputs.items():
        part, _, field = name.partition(".")
        if field.startswith("plane"):
            rows = plan.slots * plan.parts[part].widths[int(field.removeprefix("plane"))] // 8
            found[f"{name}.pages"] = pltpu.VMEM((2, plan.heads, rows, array.shape[3]), array.dtype)
    return {**found, "arrived": pltpu.SemaphoreType.DMA((2,))}


def fetch(step: "Step", live: jax.Ref) -> None:
    """Starts the copies of the next step's pages, and waits for those of this one.

    Args:
      step: this one.
      live: blocks of each sequence that hold a slot which a query sees; no others are copied.
    """
    first = (step.block == 0) & (step.group == 0)
    if step.plan.one_core:
        first &= step.row == 0
    # The first step finds nothing there, and starts its own copies as well.
    jax.lax.fori_loop(jnp.where(first, 0, 1), 2, lambda ahead, _: _start(step, live, ahead), None)

    @pl.when(step.block < live[step.row])
    def _() -> None:
        for _, _, buffer, rows in _planes(step):
            arrived = buffer.at[step.buffer, :, pl.ds(0, rows * _units(step.plan))]
            pltpu.make_async_copy(arrived, arrived, step.ref["arrived"].at[step.buffer]).wait()


def _units(plan: "Plan") -> int:
    """Of a block; where there is but one, it may be longer than what is read, and whole tiles are waited for."""
    if plan.num_slots >= plan.slots:
        return plan.slots // plan.unit
    whole = math.lcm(_slots_of_tiles(plan), plan.unit)
    return -(-plan.num_slots // whole) * whole // plan.unit


def _planes(step: "Step") -> list[tuple[str, Any, Any, int]]:
    """Name, what is stored, the buffer and rows of a unit."""
    found, plan = [], step.plan
    for part, layout in plan.parts.items():
        for index, width in enumerate(layout.widths):
            name = f"{part}.plane{index}"
            found.append((name, step.ref[name], step.ref[f"{name}.pages"], plan.unit * width // 8))
    return found


def _start(step: "Step", live: jax.Ref, ahead: jax.Array) -> None:
    """Starts the copies of this step (0) or the next one (1)."""
    plan = step.plan
    block, group = step.block + ahead, step.group
    group += jnp.where(block == plan.num_blocks, 1, 0)
    block = jnp.where(block == plan.num_blocks, 0, block)
    last = group == pl.num_programs(1)
    row = step.row + jnp.where(last, 1, 0)
    group = jnp.where(last, 0, group)
    inside = row < pl.num_programs(0) if plan.one_core else ~last
    row = jnp.where(inside, row, step.row)
    buffer = (step.buffer + ahead) & 1

    @pl.when(inside & (block < live[row]))
    def _() -> None:
        def of_head(head: jax.Array, _: None) -> None:
            stored = group * plan.heads + head
            first = ((row * pl.num_programs(1) * plan.heads + stored) * plan.num_blocks + block) * (
                plan.slots // plan.unit
            )
            _copy(step, row, stored, first=first, target=(buffer, head))

        jax.lax.fori_loop(0, plan.heads, of_head, None)


def _copy(step: "Step", row: jax.Array, stored: jax.Array, *, first: jax.Array, target: tuple[Any, Any]) -> None:
    """Starts the copies of one head's block."""
    count, planes = _units(step.plan), _planes(step)

    def one(unit: Any) -> None:
        place = step.ref["pages"][first + unit]
        for _, stored_in, buffer, rows in planes:
            start = pl.multiple_of(place * rows, rows)
            end = unit * rows if isinstance(unit, int) else pl.multiple_of(unit * rows, rows)
            pltpu.make_async_copy(
                stored_in.at[row, stored, pl.ds(start, rows)],
                buffer.at[*target, pl.ds(end, rows)],
                step.ref["arrived"].at[target[0]],
            ).start()

    def some(index: jax.Array, _: None) -> None:
        for place in range(_ABREAST):
            one(index * _ABREAST + place)

    whole = count // _ABREAST if count > _ABREAST else 0
    if whole:
        jax.lax.fori_loop(0, whole, some, None)
    for unit in range(whole * _ABREAST, count):
        one(unit)
