"""Slots of packed codes overwritten on a TPU, in place, wherever in a byte they lie.

    grid (stored heads, blocks of bytes), in each step a loop over 128 bytes of all channels

    hit[r, u]   1 where new token u goes into byte r          bytes  = hit x (codes shifted to their place in the byte)
                                                              fields = hit x (ones at that place)

Several tokens of one byte are at different places of it, so that sums are what `or` would give, and both products are
exact: numbers below 256 times one. A body is read and written once, which costs no more than the tiles of 32 bytes
around each of a round's tokens would.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from kernels_pallas._tpu import LANES, VMEM, not_a_tpu
from kernels_pallas.coded import Parts
from kernels_pallas.slots.reference import byte_planes, no_fields

_TILE = 32  # rows of bytes in a register
_BLOCK_BYTES = 1024  # of each channel
_PIECE_BYTES = 128
_MOST_ODD_BYTES = 256  # which are no whole tiles, and so are not cut
_MOST_NEW = 1024


def unsupported(parts: Parts, num_new: int, unit: int, device: str) -> str | None:
    """Why slots cannot be overwritten; None if they can.

    Args:
      parts: arrays, or their shapes.
      num_new: units that come.
      unit: slots that move together.
      device: kind of the device, e.g. "TPU v6 lite".
    """
    if (reason := not_a_tpu(device)) is not None:
        return reason
    if (reason := no_fields(parts, num_new, unit, most_new=_MOST_NEW)) is not None:
        return reason
    for plane in byte_planes(parts):
        if plane.shape[2] % _TILE and plane.shape[2] > _MOST_ODD_BYTES:
            return f"{plane.shape[2]} bytes a channel do not fill tiles of {_TILE}"
    return None


def block_of(num_bytes: int) -> int:
    """Bytes of each channel that a step takes, of so many."""
    return min(num_bytes, _BLOCK_BYTES)


def piece_of(block: int) -> int:
    """Bytes of each channel that the loop within a step takes: whole tiles, or all at once where there are few."""
    whole = math.gcd(block, _PIECE_BYTES)
    return whole if whole % _TILE == 0 else block


def put_fields(
    plane: Int[Array, "B k bytes R"],
    fields: UInt8[Array, "B k U R"],
    slots: Int[Array, "B k U"],
    *,
    width: int,
    interpret: Any = False,
) -> Int[Array, "B k bytes R"]:
    """Fields of `width` bits written into packed bytes, in place.

    Args:
      plane: int8, of parts that are not `unsupported`.
      fields: of the new tokens, the `width` lowest bits count.
      slots: int32, where they go; distinct. Negative: nowhere.
      width: of a code in this plane.
      interpret: run on any device, step by step; True, or how (`pltpu.InterpretParams`).
    """
    *heads, num_bytes, size = plane.shape
    per_byte, ones = 8 // width, (1 << width) - 1
    beside = [(0, 0), (0, 0), (0, -slots.shape[2] % LANES)]
    slots = jnp.pad(slots, beside, constant_values=-1)
    fields = jnp.pad(fields, [*beside, (0, 0)])
    at = jnp.where(slots >= 0, slots // per_byte, -1)
    place = jnp.where(slots >= 0, slots % per_byte, 0) * width
    shifted = ((fields.astype(jnp.int32) & ones) << place[..., None]).astype(jnp.bfloat16)
    masks = jnp.left_shift(jnp.int32(ones), place).astype(jnp.float32)
    arrays = (
        plane.reshape(-1, num_bytes, size),
        shifted.reshape(-1, *shifted.shape[2:]),
        masks.reshape(-1, masks.shape[2], 1),
        at.reshape(-1, 1, at.shape[2]),
    )
    return _call(*arrays, interpret=interpret).reshape(*heads, num_bytes, size)


def _call(
    plane: Int[Array, "heads bytes R"],
    shifted: Float[Array, "heads U R"],
    masks: Float[Array, "heads U 1"],
    at: Int[Array, "heads 1 U"],
    *,
    interpret: Any,
) -> Int[Array, "heads bytes R"]:
    """Runs the kernel."""
    num_heads, num_bytes, size = plane.shape
    block = block_of(num_bytes)

    def of_head(array: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, *array.shape[1:]), lambda head, block: (head, 0, 0))

    of_block = pl.BlockSpec((1, block, size), lambda head, block: (head, block, 0))
    call = pl.pallas_call(
        _kernel,
        grid=(num_heads, pl.cdiv(num_bytes, block)),
        in_specs=[of_block, of_head(shifted), of_head(masks), of_head(at)],
        out_specs=of_block,
        out_shape=jax.ShapeDtypeStruct(plane.shape, plane.dtype),
        input_output_aliases={0: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="slots",
    )
    return call(plane, shifted, masks, at)


def _kernel(plane: jax.Ref, shifted: jax.Ref, masks: jax.Ref, at: jax.Ref, done: jax.Ref) -> None:
    """A block of bytes of one head, a piece at a time."""
    _, num_bytes, size = plane.shape
    piece = piece_of(num_bytes)
    first = pl.program_id(1) * num_bytes
    mask = jnp.broadcast_to(masks[0], (masks.shape[1], size)).astype(jnp.bfloat16)

    def put_piece(index: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(index * piece, piece), piece)
        byte = jax.lax.broadcasted_iota(jnp.int32, (piece, at.shape[2]), 0) + (first + index * piece)
        hit = jnp.where(at[0] == byte, 1.0, 0.0).astype(jnp.bfloat16)
        new, fields = (
            jnp.dot(hit, array, preferred_element_type=jnp.float32).astype(jnp.int32) for array in (shifted[0], mask)
        )
        written = (plane[0, rows].astype(jnp.int32) & ~fields) | new
        signed = ((written & 255) ^ 128) - 128
        done[0, rows] = signed.astype(jnp.int8)

    jax.lax.fori_loop(0, num_bytes // piece, put_piece, None)
