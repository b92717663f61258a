"""Thresholds of rows of keys on a TPU, a bit a pass: rows on sublanes, slots on lanes.

    grid (rows / rows of a step)      keys and ages `R S` of a step stay in VMEM for all passes

Each pass compares every key with the threshold raised by one bit and counts those that reach it: in each lane first,
and then over lanes, which takes as long as comparing a hundred tiles. So a step has as many rows as fit. The search for
the newest of keys that tie runs only in steps where a row has such keys.

Keys are compared as signed integers, of which -2**31 is never kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt32

from kernels_pallas._tpu import LANES, ROWS, not_a_tpu
from kernels_pallas.select import reference

_LOWEST = -(2**31)
_STEP_KEYS = 1 << 18  # of all rows of a step, 256 tiles written out one after the other
_PIECE_SLOTS = 1 << 13  # of longer rows, in a loop
_FEW_ROWS = 32
_MOST_SLOTS = 1 << 18  # eight rows of keys and ages, twice each, take 32 MiB of VMEM


def unsupported(shape: tuple[int, ...], device: str) -> str | None:
    """Why rows cannot be served; None if they can.

    Args:
      shape: of the scores, `*rows S`.
      device: kind of the device, e.g. "TPU v6 lite".
    """
    if (reason := not_a_tpu(device)) is not None:
        return reason
    if shape[-1] > _MOST_SLOTS:
        return f"{shape[-1]} slots a row are more than the {_MOST_SLOTS} that fit its memory"
    return None


def rows_for(num_rows: int, num_slots: int) -> int:
    """Rows of a step: a power of two of tiles, no more than there are.

    Args:
      num_rows: of the whole, a multiple of 8.
      num_slots: S.
    """
    most = max(min(num_rows, _STEP_KEYS // num_slots) // ROWS, 1)
    return ROWS << (most.bit_length() - 1)


def thresholds(
    keys: UInt32[Array, "*rows S"],
    recency: Int[Array, "*rows S"],
    wanted: Int[Array, "*rows 1"],
    *,
    interpret: Any = False,
) -> tuple[UInt32[Array, "*rows 1"], Int[Array, "*rows 1"]]:
    """See `reference.thresholds`; the key is the largest that `wanted` slots reach.

    Args:
      keys: of rows that are not `unsupported`.
      recency: of the slots.
      wanted: slots of each row.
      interpret: run on any device, step by step; True, or how (`pltpu.InterpretParams`).
    """
    return reference.by_signed(functools.partial(_search, interpret=interpret), keys, recency, wanted)


def _search(
    keys: Int[Array, "rows S"], ages: Int[Array, "rows S"], wanted: Int[Array, "rows 1"], *, interpret: Any
) -> tuple[Int[Array, "rows 1"], Int[Array, "rows 1"]]:
    """Fills up to whole tiles, and runs the kernel."""
    num_rows, num_slots = keys.shape
    below = -num_rows % ROWS
    beside = -num_slots % (LANES if num_slots * ROWS <= _STEP_KEYS else _PIECE_SLOTS)
    # Rows that fill up have no key, and are done at once.
    keys, ages = (
        jnp.pad(array, [(0, below), (0, beside)], constant_values=fill) for array, fill in ((keys, _LOWEST), (ages, -1))
    )
    wanted = jnp.pad(wanted, [(0, below), (0, 0)], constant_values=1)
    step = rows_for(*keys.shape)
    of_step = [pl.BlockSpec((step, width), lambda index: (index, 0)) for width in (keys.shape[1], 1, LANES)]
    found = jax.ShapeDtypeStruct((keys.shape[0], LANES), jnp.int32)
    best, newest = pl.pallas_call(
        _kernel,
        grid=(pl.cdiv(keys.shape[0], step),),
        in_specs=[of_step[0], of_step[0], of_step[1]],
        out_specs=[of_step[2]] * 2,
        out_shape=[found] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=16 * 2**20 + 16 * step * keys.shape[1]
        ),
        interpret=interpret,
        name="select",
    )(keys, ages, wanted)
    return best[:num_rows, :1], newest[:num_rows, :1]


def pieces(rows: int, num_slots: int) -> int:
    """In which rows of so many slots are counted, one after another."""
    return 1 if rows * num_slots <= _STEP_KEYS else num_slots // _PIECE_SLOTS


def _kernel(keys: jax.Ref, ages: jax.Ref, wanted: jax.Ref, best: jax.Ref, newest: jax.Ref) -> None:
    """The thresholds of some rows, the same in all lanes."""
    shape = best.shape
    num_wanted = jnp.broadcast_to(wanted[...], shape)

    def try_bit(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        threshold, reached_by = carry
        raised = threshold ^ jnp.left_shift(jnp.int32(1), 31 - index)
        reached = _count(lambda key, _: key[...] >= raised, keys, ages)
        taken = reached >= num_wanted
        return jnp.where(taken, raised, threshold), jnp.where(taken, reached, reached_by)

    start = jnp.full(shape, _LOWEST, jnp.int32), jnp.zeros(shape, jnp.int32)
    found, reached_by = jax.lax.fori_loop(0, 32, try_bit, start)
    best[...] = found
    newest[...] = jnp.zeros(shape, jnp.int32)

    @pl.when(jnp.any(reached_by > num_wanted))
    def _() -> None:
        left = num_wanted - _count(lambda key, _: key[...] > found, keys, ages)

        def try_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
            raised = threshold | jnp.left_shift(jnp.int32(1), 30 - index)
            reached = _count(lambda key, age: (key[...] == found) & (age[...] >= raised), keys, ages)
            return jnp.where(reached >= left, raised, threshold)

        newest[...] = jax.lax.fori_loop(0, 31, try_bit, jnp.zeros(shape, jnp.int32))


def _count(holds: Any, keys: jax.Ref, ages: jax.Ref) -> jax.Array:
    """Slots of each row for which `holds(keys, ages)` of 128 slots, in all lanes."""
    rows, num_slots = keys.shape
    size = num_slots // pieces(rows, num_slots)
    # Of few rows each sum waits for the last, so that several are taken.
    apart = max(_FEW_ROWS // rows, 1)

    def of_piece(index: jax.Array | int, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start = pl.ds(index * size if isinstance(index, int) else pl.multiple_of(index * size, size), size)
        some_keys, some_ages = keys.at[:, start], ages.at[:, start]
        for offset in range(0, size, LANES):
            tile = pl.ds(offset, LANES)
            held = holds(some_keys.at[:, tile], some_ages.at[:, tile]).astype(jnp.int32)
            totals = (*totals[1:], totals[0] + held)
        return totals

    zeros = (jnp.zeros((rows, LANES), jnp.int32),) * apart
    totals = of_piece(0, zeros) if size == num_slots else jax.lax.fori_loop(0, num_slots // size, of_piece, zeros)
    return jnp.broadcast_to(jnp.sum(sum(totals[1:], totals[0]), axis=1, keepdims=True), (rows, LANES))
