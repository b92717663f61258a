"""Decode attention over one segment on a TPU: each stored head's keys and values are read once, for all of its queries.

    floats   bfloat16 or float32 as they are                         mosaic_floats.py
    codes    integers of 8, 4 and 2 bits with a scale a token        mosaic_codes.py

Which slots count is said by positions. Blocks behind the last live slot are neither fetched nor computed: their index
map stays at the last live block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import device_kind
from kernels_pallas._tpu import LANES, not_a_tpu
from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import mosaic_codes, mosaic_floats, mosaic_plan
from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Running, Segment, live_slots

_ROWS = 8  # sublanes of a float32 tile: rows come in multiples
_MOST_ROWS = 128  # of a head; a prompt's chunks are read by XLA
_NARROW = ("TPU v5",)  # chips whose matrix unit is 128 wide


def unsupported(segment: Segment, device: str) -> str | None:
    """Why a segment cannot be served; None if it can.

    Args:
      segment: arrays, or their shapes.
      device: kind of the device, e.g. "TPU v6 lite".
    """
    keys, values = segment.keys[0], segment.values[0]
    if (reason := not_a_tpu(device)) is not None:
        return reason
    if segment.owners is not None:
        return "heads share one pool of slots"
    for name, parts in (("keys", segment.keys), ("values", segment.values)):
        if len(parts) != 1 or not isinstance(parts[0], Coded):
            return f"{name} have several parts, or are turned when they are read"
        if (reason := _unsupported_part(parts[0], segment.positions.shape[2], device)) is not None:
            return f"{name} {reason}"
    if segment.positions.shape[1] not in (1, keys.num_heads):
        return "heads that hold tokens of their own share stored keys"
    if keys.num_heads != values.num_heads or (keys.bits is None) != (values.bits is None):
        return "keys and values are not both codes, or not of as many heads"
    if keys.bits is None and keys.planes[0].dtype != values.planes[0].dtype:
        return "keys and values are floats of two kinds"
    if keys.bits is not None and keys.bits < values.bits:
        return f"keys of {keys.bits} bits have fewer than values of {values.bits}"
    if keys.bits is not None and device.startswith("TPU7"):
        return f"{device} multiplies no integers"
    rows = segment.queries.shape[1] * segment.queries.shape[2] // keys.num_heads
    return f"{rows} queries share a head, more than {_MOST_ROWS}" if rows > _MOST_ROWS else None


def _unsupported_part(part: Coded, num_slots: int, device: str) -> str | None:
    if part.bits is None:
        plain = part.planes[0].dtype in (jnp.bfloat16, jnp.float32) and part.scale is None and part.offset is None
        return None if plain and not part.dtype else "are 8-bit floats, or floats with scales"
    if part.bits not in mosaic_plan.BITS:
        return f"have {part.bits} bits"
    if part.levels is not None and (part.bits == 8 or part.shift or part.planes[0].shape[3] % LANES):
        return "have levels of a table, and are not 2 or 4 bits of heads of 128 or 256"
    if part.levels is not None and device.startswith(_NARROW):
        return f"have levels of a table, and {device} looks no bytes up"
    if part.offset is not None or part.token_group != 1 or part.scale is None or part.scale.ndim != 3:
        return "have offsets, or scales of channels"
    if part.scale.dtype != jnp.float16:
        return f"have scales in {part.scale.dtype}, and not in float16"
    least = mosaic_plan.least_slots(part.bits)
    return None if num_slots >= least else f"have {num_slots} slots, and {least} of {part.bits} bits fill a tile"


def walk(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    scale: float,
    *,
    mesh: Mesh | None = None,
    interpret: Any = False,
) -> Running:
    """Attention over one segment; see `reference.decode_attention`.

    Args:
      segment: one that is not `unsupported`.
      query_positions: `B T` int32.
      scale: of the scores.
      mesh: over which the arrays lie, see `api.decode_attention`; each device runs the kernel on what it has.
      interpret: run on any device, step by step; True, or how (`pltpu.InterpretParams`).

    Returns:
      Unscaled output, maximum and sum of weights, as the reference's walk gives them.
    """
    wide = not device_kind(mesh).startswith(_NARROW)
    function = functools.partial(_walk, scale=scale, wide=wide, interpret=interpret)
    return over_mesh(function, segment, query_positions, mesh)


def _walk(
    queries: Float[Array, "B T N R"],
    keys: Coded,
    values: Coded,
    positions: Int[Array, "B #k S"],
    bias: Float[Array, "B T N"] | None,
    query_positions: Int[Array, "B T"],
    *,
    scale: float,
    wide: bool,
    interpret: Any,
) -> Running:
    """What one device does."""
    batch, num_tokens, num_heads, _ = queries.shape
    stored, num_slots = keys.num_heads, positions.shape[2]
    count = num_heads // stored * num_tokens
    padded = -(-count // _ROWS) * _ROWS

    def as_rows(array: jax.Array) -> jax.Array:
        """`B T N ...` -> `B k Q ...`, filled up to whole tiles."""
        rows = jnp.swapaxes(array.astype(jnp.float32), 1, 2).reshape(batch, stored, count, *array.shape[3:])
        return jnp.pad(rows, [(0, 0), (0, 0), (0, padded - count)] + [(0, 0)] * (rows.ndim - 3))

    # What padding asks is nothing, and must not set the unit of the others' integers.
    queries = jnp.where((query_positions >= 0)[:, :, None, None], queries, jnp.zeros_like(queries))
    row_positions = jnp.tile(query_positions, (1, num_heads // stored))  # a group's heads, each with T tokens
    given = {
        "bias": None if bias is None else as_rows(bias) * scale,
        "positions": positions,
        "query_positions": jnp.pad(row_positions, ((0, 0), (0, padded - count)), constant_values=-1),
        "interpret": interpret,
    }
    last = live_slots(query_positions, positions)
    facts = {"rows": padded, "num_slots": num_slots, "biased": bias is not None}
    if keys.bits is None:
        dtype, planes = keys.planes[0].dtype, (keys.planes[0], values.planes[0])
        width = max(plane.shape[3] for plane in planes)
        facts |= {"num_heads": stored, "width": width, "shared": positions.shape[1] == 1}
        floats = mosaic_floats.plan_for(dtype, scale=scale, **facts)
        live, holes = -(-last // floats.slots), _holes(query_positions, positions, floats.slots)
        found = mosaic_floats.run(floats, as_rows(queries), *planes, live=live, holes=holes, **given)
    else:
        codes = mosaic_plan.plan_for(keys, values, one_position=num_tokens == 1, wide=wide, **facts)
        live = -(-last // codes.slots)
        found = mosaic_codes.run(codes, as_rows(queries), keys, values, live=live, scale=scale, **given)

    def as_heads(array: jax.Array) -> jax.Array:
        """`B k Q ...` -> `B N T ...`."""
        return array[:, :, :count].reshape(batch, num_heads, num_tokens, *array.shape[3:])

    return as_heads(found[0]), as_heads(found[1]), as_heads(found[2])


def _holes(query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"], slots: int) -> Int[Array, "B blocks"]:
    """Which blocks of each sequence hold a slot that none of its queries sees."""
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    seen = (positions >= 0) & (positions <= newest)  # B K S
    padding = -positions.shape[2] % slots
    blocks = jnp.pad(seen, [(0, 0), (0, 0), (0, padding)]).reshape(*seen.shape[:2], -1, slots)
    return jnp.any(~blocks, axis=(1, 3)).astype(jnp.int32)
