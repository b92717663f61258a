"""Decode attention over one segment on a TPU: each stored head's keys and values are read once, for all of its queries.

    integers   codes of 8, 4 and 2 bits with a scale a token, on chips that multiply integers      mosaic_codes.py
    floats     everything else: floats, or codes that become floats in fast memory                 mosaic_floats.py

Which slots count is said by positions. Blocks behind the last live slot are neither fetched nor computed: their index
map stays at the last live block.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import device_kind
from kernels_pallas._tpu import LANES, ROWS, not_a_tpu
from kernels_pallas.coded import Coded, Parts
from kernels_pallas.decode_attention import mosaic_codes, mosaic_floats, mosaic_mass, mosaic_pages, mosaic_plan
from kernels_pallas.decode_attention.mosaic_parts import CHUNK
from kernels_pallas.decode_attention.over_mesh import over_mesh
from kernels_pallas.decode_attention.reference import Running, Segment, Totals, live_slots

_MOST_ROWS = 128  # of a head; a prompt's chunks are read by XLA
_MOST_LEVELS = 16
_NARROW = ("TPU v5",)  # chips whose matrix unit is 128 wide, and which look nothing but words up
_TWO_CORES = ("TPU v5", "TPU v5p")  # that share a grid
_NATIVE = {"TPU v6": ("float8_e4m3b11fnuz", "float8_e5m2"), "TPU7": ("float8_e4m3fn", "float8_e5m2")}
"""Floats of 8 bits that a chip's matrix unit multiplies with bfloat16 as they are."""
_FLOATS_ONLY = ("TPU7",)  # chips whose matrix unit takes no integers


def unsupported(segment: Segment, device: str) -> str | None:
    """Why a segment cannot be served; None if it can.

    Args:
      segment: arrays, or their shapes.
      device: kind of the device, e.g. "TPU v6 lite".
    """
    if (reason := not_a_tpu(device)) is not None:
        return reason
    for name, parts in (("keys", segment.keys), ("values", segment.values)):
        for part in parts:
            if not isinstance(part, Coded):
                return f"{name} are turned when they are read"
            if (reason := _unsupported_part(part)) is not None:
                return f"{name} {reason}"
    stored = {part.num_heads for part in segment.keys + segment.values}
    if len(stored) > 1:
        return "keys and values are not of as many heads"
    if segment.positions.shape[1] not in (1, *stored):
        return "heads that hold tokens of their own share stored keys"
    rows = segment.queries.shape[1] * segment.queries.shape[2] // max(stored)
    if rows > _MOST_ROWS:
        return f"{rows} queries share a head, more than {_MOST_ROWS}"
    if segment.pages is None:
        return None
    return mosaic_pages.unsupported(segment, float_plan(segment, segment.values, 1.0, device))


def _unsupported_part(part: Coded) -> str | None:
    if part.bits is None and not part.dtype:
        dtype, plain = part.planes[0].dtype, part.scale is None and part.offset is None
        plain &= not part.shift
        return None if plain and dtype in (jnp.bfloat16, jnp.float32) else f"are {dtype}, or floats with scales"
    if part.levels is not None and (len(part.levels) > _MOST_LEVELS or len(part.levels) != 1 << part.bits):
        return (
            f"have a table of {len(part.levels)} levels for {part.bits} bits, and not of 2**bits up to {_MOST_LEVELS}"
        )
    if part.scale is None:
        return None if part.bits is None and part.offset is None and not part.shift else "have no scales"
    if any(array is not None and array.dtype != jnp.float16 for array in (part.scale, part.offset)):
        return f"have scales in {part.scale.dtype}, or offsets, and not in float16"
    if part.dtype and part.token_group > 1:
        return "are 8-bit floats with scales of channels"
    if part.token_group > 1 and (part.token_group % ROWS or CHUNK % part.token_group):
        return f"have scales of {part.token_group} tokens, and not of 8, 16, 32, 64, 128 or 256"
    return None


def _by_integers(segment: Segment, device: str) -> bool:
    """Whether `mosaic_codes` serves a segment that `unsupported` lets pass."""
    if len(segment.keys) + len(segment.values) > 2 or segment.owners is not None or segment.pages is not None:
        return False
    if not segment.values:
        return False
    keys, values = segment.keys[0], segment.values[0]
    if device.startswith(_FLOATS_ONLY) or keys.bits is None or values.bits is None or keys.bits < values.bits:
        return False
    return all(_has_integers(part, segment.positions.shape[2], device) for part in (keys, values))


def _has_integers(part: Coded, num_slots: int, device: str) -> bool:
    if part.bits not in mosaic_plan.BITS or part.offset is not None or part.token_group != 1 or part.scale.ndim != 3:
        return False
    if part.levels is not None:  # looked up by a tile of bytes
        whole = part.bits != 8 and not part.shift and part.planes[0].shape[3] % LANES == 0
        return whole and not device.startswith(_NARROW) and num_slots >= mosaic_plan.least_slots(part.bits)
    return num_slots >= mosaic_plan.least_slots(part.bits)


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
    function = functools.partial(_walk, scale=scale, device=device_kind(mesh), interpret=interpret)
    return over_mesh(function, owned(segment), query_positions, mesh)


def plan_for(segment: Segment, scale: float, device: str) -> mosaic_plan.Plan | mosaic_floats.Plan:
    """What a kernel for one device's arrays is written for; its type says which kernel.

    Args:
      segment: one that is not `unsupported`; arrays, or their shapes.
      scale: of the scores.
      device: the kind.
    """
    if not _by_integers(segment, device):
        return float_plan(segment, segment.values, scale, device)
    alone, wide = segment.queries.shape[1] == 1, not device.startswith(_NARROW)
    facts = _facts(segment)
    return mosaic_plan.plan_for(segment.keys[0], segment.values[0], one_position=alone, wide=wide, **facts)


def _facts(segment: Segment) -> dict[str, Any]:
    """What both kinds of plans want."""
    rows = segment.queries.shape[1] * segment.queries.shape[2] // segment.keys[0].num_heads
    slots, biased = segment.positions.shape[2], segment.bias is not None
    return {"rows": -(-rows // ROWS) * ROWS, "num_slots": slots, "biased": biased}


def float_plan(segment: Segment, values: Parts, scale: float, device: str) -> mosaic_floats.Plan:
    """The plan of a kernel for the float matrix unit, of a segment's keys and of some values, or none."""
    shared, pooled = segment.positions.shape[1] == 1, segment.owners is not None
    wide = not device.startswith(_NARROW)
    given = {"scale": scale, "shared": shared, "pooled": pooled}
    native = next((dtypes for chip, dtypes in _NATIVE.items() if device.startswith(chip)), ())
    given |= {"short": wide, "ahead": wide, "native": native}
    if segment.pages is None:
        return mosaic_floats.plan_for(segment.keys, values, **given, **_facts(segment))
    parts = (mosaic_pages.shaped(one, segment.page) for one in (segment.keys, values))
    plan = mosaic_floats.plan_for(*parts, **given, **_facts(segment))
    return mosaic_pages.fitted(plan, segment.page, one_core=device not in _TWO_CORES)


def _walk(
    segment: Segment, query_positions: Int[Array, "B T"], *, scale: float, device: str, interpret: Any
) -> Running:
    """What one device does."""
    keys, values, positions = segment.keys, segment.values, segment.positions
    plan = plan_for(segment, scale, device)
    queries, given = rows_of(segment, query_positions, scale, plan.rows)
    live = -(-live_slots(query_positions, positions) // plan.slots)
    given |= {"live": live, "interpret": interpret}
    if isinstance(plan, mosaic_plan.Plan):
        found = mosaic_codes.run(plan, queries, keys[0], values[0], scale=scale, **given)
    else:
        holes = _holes(query_positions, positions, plan.slots) if plan.cleared else _no_holes(live, plan)
        given |= pool_of(segment, query_positions, plan.rows) | {"pages": None}
        if segment.pages is not None:
            keys, values = (mosaic_pages.with_scales(parts, segment) for parts in (keys, values))
            given["pages"] = mosaic_pages.units_of(segment, plan)
        found = mosaic_floats.run(plan, queries, keys, values, holes=holes, **given)

    def as_heads(array: jax.Array) -> jax.Array:
        """`B k Q ...` -> `B N T ...`."""
        batch, tokens, heads, _ = segment.queries.shape
        return array[:, :, : tokens * heads // keys[0].num_heads].reshape(batch, heads, tokens, *array.shape[3:])

    return as_heads(found[0]), as_heads(found[1]), as_heads(found[2])


def _as_rows(array: jax.Array, stored: int, rows: int) -> jax.Array:
    """`B N T ...` -> `B k Q ...` float32, filled up to whole tiles."""
    found = array.astype(jnp.float32).reshape(array.shape[0], stored, -1, *array.shape[3:])
    return jnp.pad(found, [(0, 0), (0, 0), (0, rows - found.shape[2])] + [(0, 0)] * (found.ndim - 3))


def rows_of(
    segment: Segment, query_positions: Int[Array, "B T"], scale: float, rows: int
) -> tuple[jax.Array, dict[str, Any]]:
    """Queries as rows of a stored head, and what else belongs to them and to slots."""
    stored, bias = segment.keys[0].num_heads, segment.bias
    # What padding asks is nothing, and must not set the unit of the others' integers.
    queries = jnp.where((query_positions >= 0)[:, :, None, None], segment.queries, jnp.zeros_like(segment.queries))
    row_positions = jnp.tile(query_positions, (1, queries.shape[2] // stored))  # a group's heads, each with T tokens
    padding = rows - row_positions.shape[1]
    return _as_rows(jnp.swapaxes(queries, 1, 2), stored, rows), {
        "bias": None if bias is None else _as_rows(jnp.swapaxes(bias, 1, 2), stored, rows) * scale,
        "positions": segment.positions,
        "query_positions": jnp.pad(row_positions, ((0, 0), (0, padding)), constant_values=-1),
    }


def pool_of(segment: Segment, query_positions: Int[Array, "B T"], rows: int) -> dict[str, Any]:
    """Whose slots and whose rows these are, where heads share a pool."""
    if segment.owners is None:
        return {"owners": None, "row_heads": None}
    of_head = segment.queries.shape[2] // segment.num_kv_heads * query_positions.shape[1]
    return {"owners": segment.owners, "row_heads": jnp.arange(rows, dtype=jnp.int32) // of_head}


def owned(segment: Segment) -> Segment:
    """A pool's slots that belong to no head are empty ones."""
    if segment.owners is None:
        return segment
    some = (segment.owners >= 0) & (segment.owners < segment.num_kv_heads)
    return dataclasses.replace(segment, positions=jnp.where(some, segment.positions, -1))


def mass_unsupported(segment: Segment) -> str | None:
    """Why the masses of a segment that is not `unsupported` cannot be given; None if they can."""
    if segment.pages is not None:
        return "pages are read"
    shared = segment.owners is None and segment.keys[0].num_heads != segment.num_kv_heads
    return "heads share their stored keys" if shared else None


def mass(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    scale: float,
    totals: Totals,
    kind: str,
    *,
    mesh: Mesh | None = None,
    interpret: Any = False,
) -> Float[Array, "B #K S"]:
    """What the weights of each slot come to: see `reference.decode_attention`, and `walk` for the arguments.

    Args:
      segment: one that is neither `unsupported` nor `mass_unsupported`.
      query_positions: `B T` int32.
      scale: of the scores.
      totals: of all segments.
      kind: one of `reference.MASSES`.
      mesh: as for `walk`.
      interpret: as for `walk`.
    """
    function = functools.partial(_mass, scale=scale, kind=kind, device=device_kind(mesh), interpret=interpret)
    return over_mesh(function, owned(segment), query_positions, mesh, totals.level, totals.uniform)


def _mass(
    segment: Segment,
    query_positions: Int[Array, "B T"],
    level: Float[Array, "B N T"],
    uniform: Float[Array, "B N T"],
    *,
    scale: float,
    kind: str,
    device: str,
    interpret: Any,
) -> Float[Array, "B #K S"]:
    """What one device does."""
    plan = float_plan(segment, (), scale, device)
    queries, given = rows_of(segment, query_positions, scale, plan.rows)
    given |= pool_of(segment, query_positions, plan.rows)
    stored = segment.keys[0].num_heads
    return mosaic_mass.run(
        plan,
        queries,
        segment.keys,
        level=_as_rows(level, stored, plan.rows),
        uniform=_as_rows(uniform, stored, plan.rows),
        live=-(-live_slots(query_positions, segment.positions) // plan.slots),
        mass=kind,
        group=segment.queries.shape[2] // segment.num_kv_heads,
        interpret=interpret,
        **given,
    )


def _holes(query_positions: Int[Array, "B T"], positions: Int[Array, "B #K S"], slots: int) -> Int[Array, "B blocks"]:
    """Which blocks of each sequence hold a slot that none of its queries sees."""
    newest = jnp.max(query_positions, axis=1)[:, None, None]
    seen = (positions >= 0) & (positions <= newest)  # B K S
    padding = -positions.shape[2] % slots
    blocks = jnp.pad(seen, [(0, 0), (0, 0), (0, padding)]).reshape(*seen.shape[:2], -1, slots)
    return jnp.any(~blocks, axis=(1, 3)).astype(jnp.int32)


def _no_holes(live: Int[Array, "B"], plan: mosaic_floats.Plan) -> Int[Array, "B blocks"]:
    """The same where no value can be NaN, and nobody asks."""
    return jnp.zeros((live.shape[0], -(-plan.num_slots // plan.slots)), jnp.int32)
