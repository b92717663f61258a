"""Thresholds of rows of keys on an NVIDIA GPU, two bits a pass: a program a row, all passes in one kernel.

    rows up to a block      keys stay in registers for all passes
    longer rows             blocks are read again in each pass, from the chip's caches

XLA's way is a loop of reductions over memory: sixteen passes, each of them kernels of its own, and a question to the
host in between. Here a pass counts the keys that reach each of three raised thresholds, and the best is taken. The
search for the newest of keys that tie runs only in rows that have such keys.

Keys are compared as signed integers, of which -2**31 is never kept. Pallas has deprecated its Triton route since JAX
0.11: only the choice of `api.py` depends on this file.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int, UInt32

from kernels_pallas._gpu import not_a_gpu, power
from kernels_pallas.select import reference

_LOWEST = -(2**31)
_MOST_HELD = 1 << 14  # keys of a row that stay in registers: 32 of each of 512 threads
_BLOCK = 1 << 13  # keys of longer rows that are counted together
_KEYS_OF_THREAD = 16
_MOST_WARPS = 16
_DIGITS = 10  # of a count of blocks
_MOST_SLOTS = 1 << 18  # a MiB a row: those of all multiprocessors at work fill twice the second cache


def unsupported(shape: tuple[int, ...], device: str) -> str | None:
    """Why rows cannot be served; None if they can.

    Args:
      shape: of the scores, `*rows S`.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if (reason := not_a_gpu(device)) is not None:
        return reason
    if shape[-1] > _MOST_SLOTS:
        return f"{shape[-1]} slots a row are more than the {_MOST_SLOTS} that its caches hold"
    return None


def block_of(num_slots: int) -> int:
    """Keys of a row of S slots that are counted together."""
    return power(max(num_slots, 32)) if num_slots <= _MOST_HELD else _BLOCK


def warps_of(block: int) -> int:
    """Warps of a program."""
    return min(max(block // (32 * _KEYS_OF_THREAD), 1), _MOST_WARPS)


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
      interpret: run on any device, step by step.
    """
    return reference.by_signed(functools.partial(_search, interpret=interpret), keys, recency, wanted)


def _search(
    keys: Int[Array, "rows S"], ages: Int[Array, "rows S"], wanted: Int[Array, "rows 1"], *, interpret: Any
) -> tuple[Int[Array, "rows"], Int[Array, "rows"]]:
    """Runs the kernel."""
    num_rows, num_slots = keys.shape
    row = pl.BlockSpec((None, num_slots), lambda index: (index, 0))
    number = pl.BlockSpec((None,), lambda index: (index,))
    return pl.pallas_call(
        _kernel,
        grid=(num_rows,),
        in_specs=[row, row, number],
        out_specs=[number] * 2,
        out_shape=[jax.ShapeDtypeStruct((num_rows,), jnp.int32)] * 2,
        compiler_params=pltriton.CompilerParams(num_warps=warps_of(block_of(num_slots)), num_stages=1),
        interpret=interpret,
        name="select",
    )(keys, ages, wanted[:, 0])


def _kernel(keys: jax.Ref, ages: jax.Ref, wanted: jax.Ref, best: jax.Ref, newest: jax.Ref) -> None:
    """The thresholds of a row."""
    num_wanted, num_slots = wanted[...], keys.shape[0]

    def read(ref: jax.Ref, index: jax.Array | int) -> jax.Array:
        return _load(ref, index, num_slots)

    found, reached_by = _reached_by(lambda index: read(keys, index), num_slots, num_wanted)
    best[...] = found

    def of_ties(index: jax.Array | int) -> jax.Array:
        return jnp.where(read(keys, index) == found, read(ages, index) ^ _LOWEST, _LOWEST)

    newest[...] = jnp.int32(0)

    @pl.when(reached_by > num_wanted)
    def _() -> None:
        (above,) = _count(lambda index: (read(keys, index) > found).astype(jnp.int32), num_slots, [jnp.int32(1)])
        newest[...] = _reached_by(of_ties, num_slots, num_wanted - above)[0] ^ _LOWEST


def _load(ref: jax.Ref, index: jax.Array | int, num_slots: int) -> Int[Array, "slots"]:
    """A block of a row's numbers, the least there is behind its end."""
    block = block_of(num_slots)
    start = jnp.int32(index) * block
    inside = start + jnp.arange(block, dtype=jnp.int32) < num_slots
    return pltriton.load(ref.at[pl.ds(start, block)], mask=inside, other=jnp.int32(_LOWEST))


def _reached_by(
    read: Callable[[Any], jax.Array], num_slots: int, wanted: Int[Array, ""]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The largest threshold that at least `wanted` numbers reach, and how many do; the least and 0 if there are fewer.

    Args:
      read: index of a block -> its numbers.
      num_slots: of all blocks.
      wanted: at least 1.
    """
    if num_slots <= _MOST_HELD:  # read once
        held = read(0)
        read = lambda index: held  # noqa: E731

    def try_digits(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        threshold, reached_by = carry
        place = 30 - 2 * index
        # Of numbers with a sign the highest bit is turned, and what has been found has zeros here.
        raised = [threshold ^ jnp.left_shift(jnp.int32(digit), place) for digit in (1, 2, 3)]
        for one, reached in zip(raised, _count(read, num_slots, raised), strict=True):
            taken = reached >= wanted
            threshold, reached_by = jnp.where(taken, one, threshold), jnp.where(taken, reached, reached_by)
        return threshold, reached_by

    return jax.lax.fori_loop(0, 16, try_digits, (jnp.int32(_LOWEST), jnp.int32(0)))


def _count(read: Callable[[Any], jax.Array], num_slots: int, raised: list[jax.Array]) -> list[jax.Array]:
    """How many numbers reach each of up to three thresholds."""
    block = block_of(num_slots)

    def add(index: jax.Array | int, counts: jax.Array) -> jax.Array:
        some = read(index)
        for place, one in enumerate(raised):
            counts = counts + jnp.where(some >= one, jnp.int32(1 << (_DIGITS * place)), 0)
        return counts

    counts, blocks = jnp.zeros((block,), jnp.int32), -(-num_slots // block)
    counts = add(0, counts) if blocks == 1 else jax.lax.fori_loop(0, blocks, add, counts)
    apart = [(counts >> (_DIGITS * place)) & ((1 << _DIGITS) - 1) for place in range(len(raised))]
    return [jnp.sum(one) for one in apart]
