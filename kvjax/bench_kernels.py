"""Attention alone: bytes a second over segments of each kind, beside a copy on the same device.

One query token a row over a full segment of random numbers, 8 key/value heads of 128, four query heads each. Bytes are
those of keys, values, scales and positions, read once. Calls follow each other inside one compiled loop, each with the
queries of the one before, so that neither Python nor an idle device is timed.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kvjax._kernels import Coded, Segment, choose_attention, decode_attention, device_of, plane_bits
from kvjax.accounting import device_bytes
from kvjax.peers import Case

HEADS, GROUP, SIZE = 8, 4, 128
BUDGET = 2048  # slots that a selection leaves
TOKENS, CHANNELS = 32, 32  # that share scales in `kivi`


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is stored.

    Attributes:
      bits: of a number; 16 is bfloat16, fewer are codes with a scale a token.
      slots: at most; None for all of the context.
      table: whether codes stand for levels of a table, as `turboquant` has them.
      grouped: whether scales and offsets belong to 32 tokens of a key's channel and 32 channels of a value (`kivi`).
    """

    bits: int
    slots: int | None = None
    table: bool = False
    grouped: bool = False


KINDS = {
    "bf16": Kind(16),
    "int8": Kind(8),
    "int4": Kind(4),
    "int2": Kind(2),
    "table of 4 bits": Kind(4, table=True),
    "table of 3 bits": Kind(3, table=True),
    "kivi, 2 bits": Kind(2, grouped=True),
    f"bf16, budget {BUDGET}": Kind(16, BUDGET),
    f"int4, budget {BUDGET}": Kind(4, BUDGET),
}
"""Name -> kind; the first is what others are compared with."""


def measure_kernels(case: Case, *, repeats: int, calls: int) -> list[dict[str, Any]]:
    """A row for each kind: bytes a second, their share of the copy's, and how much faster than the first kind.

    Args:
      case: batch and slots.
      repeats: how often each is measured; the best counts.
      calls: of a repeat.
    """
    rows: list[dict[str, Any]] = []
    mesh = Mesh(np.array([[device_of(None)]]), ("data", "model"))  # the arrays are there, whatever else is
    copy = _copy_rate(case, repeats=repeats, calls=calls)
    for name, kind in KINDS.items():
        segment = _segment(kind, case)
        chosen = choose_attention(segment, mesh=mesh)
        moved = device_bytes((segment.keys, segment.values, segment.positions))
        attend = jax.jit(functools.partial(_attend, calls=calls, mesh=mesh))
        arrays = segment.queries, segment.keys, segment.values, segment.positions
        seconds = _best(attend, arrays, repeats) / calls
        rows.append(
            {
                "case": str(case),
                "name": name,
                "batch": case.batch,
                "context": case.context,
                "implementation": chosen.name,
                "reasons": chosen.reasons,
                "bytes": moved,
                "seconds": seconds,
                "bytes_per_second": moved / seconds,
                "share_of_copy": moved / seconds / copy,
                "times_as_fast_as_first": rows[0]["seconds"] / seconds if rows else 1.0,
            }
        )
    return rows


def _segment(kind: Kind, case: Case) -> Segment:
    slots = min(kind.slots or case.context, case.context)
    key_of, value_of, query_of = jax.random.split(jax.random.key(0), 3)

    def part(key: jax.Array, scales: tuple[int, ...]) -> Coded:
        if kind.bits == 16:
            return Coded(planes=(jax.random.normal(key, (case.batch, HEADS, slots, SIZE), jnp.bfloat16),))
        planes = tuple(
            jax.random.randint(key, (case.batch, HEADS, slots * width // 8, SIZE), -128, 128, jnp.int8)
            for width in plane_bits(kind.bits)
        )
        half = 1 << (kind.bits - 1)
        scale = jnp.full((case.batch, HEADS, *scales), 1 / half, jnp.float16)
        if kind.table:
            levels = tuple((2 * code + 1 - 2 * half) / (2 * half) for code in range(2 * half))
            return Coded(planes=planes, scale=scale, bits=kind.bits, levels=levels)
        if not kind.grouped:
            return Coded(planes=planes, scale=scale, bits=kind.bits, shift=0.5)
        group = TOKENS if scales[-1] == SIZE else 1
        return Coded(planes=planes, scale=scale, offset=-scale, bits=kind.bits, shift=float(half), token_group=group)

    of_keys = (slots // TOKENS, SIZE) if kind.grouped else (slots,)
    of_values = (SIZE // CHANNELS, slots) if kind.grouped else (slots,)
    return Segment(
        queries=jax.random.normal(query_of, (case.batch, 1, HEADS * GROUP, SIZE), jnp.bfloat16),
        keys=(part(key_of, of_keys),),
        values=(part(value_of, of_values),),
        positions=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (case.batch, 1, slots)),
        num_kv_heads=HEADS,
    )


def _attend(queries: jax.Array, keys: Any, values: Any, positions: jax.Array, *, calls: int, mesh: Mesh) -> jax.Array:
    """Attention over and over, each time with what came out before."""
    newest = jnp.full((queries.shape[0], 1), positions.shape[2], jnp.int32)

    def call(_: jax.Array, queries: jax.Array) -> jax.Array:
        segment = Segment(queries=queries, keys=keys, values=values, positions=positions, num_kv_heads=HEADS)
        (found,) = decode_attention((segment,), query_positions=newest, scale=1 / math.sqrt(SIZE), mesh=mesh)
        return found.output.astype(queries.dtype)

    return jax.lax.fori_loop(0, calls, call, queries)


def _copy_rate(case: Case, *, repeats: int, calls: int) -> float:
    """Bytes a second that the runtime's own copy reads and writes, of an array as large as the keys in bfloat16."""
    array = jnp.zeros((case.batch * HEADS * case.context, SIZE), jnp.bfloat16)

    def copy(array: jax.Array) -> jax.Array:
        copied = array
        for _ in range(calls):  # the device is behind: it never waits for the next call
            copied = jnp.copy(array)
        return copied

    return 2 * array.nbytes * calls / _best(copy, (array,), repeats)


def _best(function: Callable[..., jax.Array], arguments: tuple[Any, ...], repeats: int) -> float:
    """Seconds of the fastest call; one more compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        since = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - since)
    return min(seconds)
