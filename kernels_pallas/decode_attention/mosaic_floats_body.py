"""The body of `mosaic_floats`: one block of slots of some heads.

Scores of all chunks of a head come first, then the largest of them, then weights and what they add up to:

    new = max(old, largest score)      w = 2^(score - new)      output = output 2^(old - new) + sum of w value
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool

from kernels_pallas._tpu import LANES, MASKED, ROWS
from kernels_pallas.decode_attention import mosaic_pages, mosaic_parts
from kernels_pallas.decode_attention.mosaic_parts import Layout, OfHead, Refs

if TYPE_CHECKING:
    from kernels_pallas.decode_attention.mosaic_floats import Plan


class Step:
    """What a step reads and writes, by name; arrays have a leading axis of length 1."""

    def __init__(self, plan: "Plan", names: tuple[str, ...], refs: tuple[jax.Ref, ...]):
        self.plan, self.ref = plan, dict(zip(names, refs, strict=True))
        self.row, self.group, self.block = (pl.program_id(axis) for axis in range(3))

    @property
    def buffer(self) -> jax.Array:
        """Which half of the buffers holds this step's pages."""
        number = (self.row * pl.num_programs(1) + self.group) * pl.num_programs(2) + self.block
        return number & 1

    def plane(self, name: str) -> Any:
        """Where a plane's block lies, `1 heads ...`."""
        return self.ref[f"{name}.pages"].at[pl.ds(self.buffer, 1)] if self.plan.unit else self.ref[name]

    def part(self, name: str) -> Refs:
        """Where a part lies; scales that are one a token are read cleaned."""
        planes = [self.plane(f"{name}.plane{index}") for index in range(len(self.plan.parts[name].widths))]
        fields = (f"{name}.scale", f"{name}.offset")
        table = self.ref.get(f"{name}.table")
        return Refs(tuple(planes), table, *[self.ref.get(f"{field}.clean", self.ref.get(field)) for field in fields])

    def visible(self, head: Any, slots: Any = slice(None)) -> Bool[Array, "Q S"]:
        """Which of a block's slots each row of a head sees."""
        positions = self._of_head("positions", head, slots)
        # As unsigned numbers empty slots (-1) are behind every query, and nothing is before padding (-1 + 1).
        ahead = jax.lax.bitcast_convert_type(self.ref["query_positions"][0] + 1, jnp.uint32)
        visible = jax.lax.bitcast_convert_type(positions, jnp.uint32) < ahead
        if self.plan.pooled:
            visible &= self.ref["owners"][0, :, slots] == self.ref["row_heads"][0]
        return visible & self._within(positions.shape, slots) if self._ragged else visible

    def seen(self, head: Any = None) -> Bool[Array, "_ S"]:
        """Which slots a sequence's newest query sees: of one head, or of all."""
        newest = jnp.max(self.ref["query_positions"][0], axis=0, keepdims=True) + 1  # 1 1
        positions = self.ref["positions"][0] if head is None else self._of_head("positions", head, slice(None))
        seen = jax.lax.bitcast_convert_type(positions, jnp.uint32) < jax.lax.bitcast_convert_type(newest, jnp.uint32)
        return seen & self._within(positions.shape, slice(None)) if self._ragged else seen

    def _of_head(self, name: str, head: Any, slots: Any) -> jax.Array:
        """`1 S` of an array that heads may share."""
        own = 0 if self.ref[name].shape[1] == 1 else head
        return self.ref[name][0, pl.ds(own, 1), slots]

    @property
    def _ragged(self) -> bool:
        return self.plan.num_slots % self.plan.slots != 0

    def _within(self, shape: tuple[int, ...], slots: Any) -> jax.Array:
        start = self.block * self.plan.slots + (0 if isinstance(slots, slice) else slots.start)
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, 1) < self.plan.num_slots


def kernel(live: jax.Ref, holes: jax.Ref, *refs: jax.Ref, plan: "Plan", names: tuple[str, ...]) -> None:
    """One step.

    Args:
      live: blocks of each sequence that hold a slot which a query sees.
      holes: blocks that hold one which none sees.
      refs: what is read, written, and kept for the step.
      plan: what it is written for.
      names: of `refs`.
    """
    step = Step(plan, names, refs)
    row = step.row
    outputs = [f"value{index}" for index in range(len(plan.values))]

    @pl.when(step.block == 0)
    def _() -> None:
        for name in (*outputs, "total"):
            step.ref[name][...] = jnp.zeros_like(step.ref[name])
        # Above what is masked, whose weights are then 0.
        step.ref["maximum"][...] = jnp.full_like(step.ref["maximum"], MASKED / 10)

    if plan.unit:
        mosaic_pages.fetch(step, live)

    @pl.when(step.block < live[row])
    def _() -> None:
        if plan.cleared:

            @pl.when(holes[row, step.block] != 0)
            def _() -> None:
                for index in plan.cleared:
                    _clear(step, step.plane(f"value{index}.plane0"), turned=plan.values[index].turned)

        clean(step)
        for_some(plan, functools.partial(_add_blocks, step))


def for_heads(plan: "Plan", function: Callable[[Any], None]) -> None:
    """Calls a function of each head of a step, some of them written out side by side."""

    def some(heads: list[Any]) -> None:
        for head in heads:
            function(head)

    for_some(plan, some)


def for_some(plan: "Plan", function: Callable[[list[Any]], None]) -> None:
    """Calls a function of those heads of a step that are written out side by side."""
    heads, together = plan.heads, plan.together
    if together == heads:
        function(list(range(heads)))
        return

    def some(index: jax.Array, _: None) -> None:
        function([index * together + head for head in range(together)])

    jax.lax.fori_loop(0, heads // together, some, None)


def clean(step: Step) -> None:
    """Scales and offsets of tokens in float32, all heads at once, 0 where nothing is seen."""
    wanted = [name for name in step.ref if name.endswith(".clean")]
    seen = step.seen() if wanted else None
    for name in wanted:
        found = mosaic_parts.of_float16(step.ref[name.removesuffix(".clean")][0])
        step.ref[name][...] = jnp.where(seen, found, 0.0)


def _clear(step: Step, values: Any, *, turned: bool) -> None:
    """Sets values that no row sees to 0: a weight of zero does not silence a NaN."""
    plan = step.plan
    size = LANES if plan.slots % LANES == 0 else plan.slots
    for head in range(plan.heads):

        def piece(index: jax.Array, _: None, head: int = head) -> None:
            slots = pl.ds(pl.multiple_of(index * size, size) if plan.slots > size else 0, size)
            seen = jnp.max(step.visible(head, slots).astype(jnp.float32), axis=0, keepdims=True)
            if not turned:
                seen = jnp.transpose(jnp.broadcast_to(seen, (ROWS, size)))[:, :1]
            place = (0, head, slice(None), slots) if turned else (0, head, slots)
            numbers = values[place]
            values[place] = jnp.where(seen > 0, numbers, jnp.zeros_like(numbers))

        jax.lax.fori_loop(0, plan.slots // size, piece, None)


def _add_blocks(step: Step, heads: list[Any]) -> None:
    """Adds a block of slots to the rows of some heads."""
    for some in [heads] if step.plan.ahead else [[head] for head in heads]:
        found = [jnp.where(step.visible(head), scores_of(step, head), MASKED) for head in some]
        for head, scores in zip(some, found, strict=True):
            _add_block(step, head, scores)


def _add_block(step: Step, head: Any, scores: jax.Array) -> None:
    """Adds a block of slots to a head's rows."""
    plan, ref = step.plan, step.ref
    old = ref["maximum"][0, head]
    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
    decay = jnp.exp2(old - new)
    weights = jnp.exp2(scores - new[:, :1])
    ref["maximum"][0, head] = new
    ref["total"][0, head] = ref["total"][0, head] * decay + jnp.sum(weights, axis=1, keepdims=True)
    for index, layout in enumerate(plan.values):
        part, sums = step.part(f"value{index}"), mosaic_parts.Sums()
        own = mosaic_parts.of_head(layout, part, head, step.seen(head) if layout.groups > 1 else None)
        for start in range(0, plan.slots, plan.chunk):
            codes = mosaic_parts.numbers(layout, part, own, head, start, plan.chunk)
            mosaic_parts.weigh(layout, weights[:, start : start + plan.chunk], own, codes, start, sums)
        output = ref[f"value{index}"]
        output[0, head] = output[0, head] * decay[:, :1] + mosaic_parts.finish(layout, sums)


def scores_of(step: Step, head: Any) -> jax.Array:
    """Scores of all rows and slots of a head in units of ln 2."""
    plan, parts = step.plan, keys_of(step, head)
    chunks = []
    for start in range(0, plan.slots, plan.chunk):
        found = None
        for layout, part, own, rows, sums in parts:
            codes = mosaic_parts.numbers(layout, part, own, head, start, plan.chunk)
            one = mosaic_parts.scores(layout, rows, sums, own, codes, start)
            found = one if found is None else found + one
        chunks.append(found)
    scores = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)
    scores = scores * plan.scale
    return scores + step.ref["bias"][0, head] if plan.biased else scores


def keys_of(step: Step, head: Any) -> list[tuple[Layout, Refs, OfHead, jax.Array, Any]]:
    """Of each part of a head's keys: layout, where it lies, its scales, the rows for it and their sums."""
    parts = []
    for index, layout in enumerate(step.plan.keys):
        part, sums = step.part(f"key{index}"), step.ref.get(f"key{index}.sums")
        own = mosaic_parts.of_head(layout, part, head, step.seen(head) if layout.groups > 1 else None)
        rows = step.ref[f"key{index}.rows"][0, head]
        parts.append((layout, part, own, rows, None if sums is None else sums[0, head]))
    return parts
