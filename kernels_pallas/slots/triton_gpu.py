"""Slots of packed codes overwritten on an NVIDIA GPU, in place: a program for each new token.

    new tokens       u        v        w           slots 9, 4, 8 of 4 bits: bytes 4, 2, 4
    byte 2 . 4       |        v -> 2   |
                     u w -> 4                      w leaves its byte to u, the first of those that go there

A program finds the tokens that go into its own token's byte. The first of them reads the byte's row of channels, puts
in the fields of all, and writes it; the others do nothing, so that a byte belongs to one program. All other bytes are
neither read nor written.

Pallas has deprecated its Triton route since JAX 0.11: only the choice of `api.py` depends on this file.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int, UInt8

from kernels_pallas._gpu import MOST_ELEMENTS, not_a_gpu, power
from kernels_pallas.coded import Parts
from kernels_pallas.slots.reference import byte_planes, no_fields

_MOST_NEW = 4096  # of which each program looks at all
_NUMBERS_OF_THREAD = 4


def unsupported(parts: Parts, num_new: int, unit: int, device: str) -> str | None:
    """Why slots cannot be overwritten; None if they can.

    Args:
      parts: arrays, or their shapes.
      num_new: units that come.
      unit: slots that move together.
      device: kind of the device, e.g. "NVIDIA H200".
    """
    if (reason := not_a_gpu(device)) is not None:
        return reason
    if (reason := no_fields(parts, num_new, unit, most_new=_MOST_NEW)) is not None:
        return reason
    too_large = any(math.prod(plane.shape) >= MOST_ELEMENTS for plane in byte_planes(parts))
    return "a plane takes 2 GiB or more" if too_large else None


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
      interpret: run on any device, step by step.
    """
    arrays = [array.reshape(-1, *array.shape[2:]) for array in (plane, fields.view(jnp.int8), slots)]
    num_heads, num_new = arrays[2].shape

    def of_head(array: jax.Array) -> pl.BlockSpec:
        rest = (0,) * (array.ndim - 1)
        return pl.BlockSpec((None, *array.shape[1:]), lambda token, head: (head, *rest))

    done = pl.pallas_call(
        functools.partial(_kernel, width=width),
        grid=(num_new, num_heads),
        in_specs=list(map(of_head, arrays)),
        out_specs=of_head(arrays[0]),
        out_shape=jax.ShapeDtypeStruct(arrays[0].shape, jnp.int8),
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(
            num_warps=max(power(plane.shape[3]) // (32 * _NUMBERS_OF_THREAD), 1), num_stages=1
        ),
        interpret=interpret,
        name="slots",
    )(*arrays)
    return done.reshape(plane.shape)


def _kernel(plane: jax.Ref, fields: jax.Ref, slots: jax.Ref, done: jax.Ref, *, width: int) -> None:
    """The byte of one new token, of all channels."""
    per_byte, ones, (num_new, size) = 8 // width, (1 << width) - 1, fields.shape
    token, every = pl.program_id(0), jnp.arange(power(num_new), dtype=jnp.int32)
    targets = pltriton.load(slots.at[every], mask=every < num_new, other=jnp.int32(-1))
    own = jnp.max(jnp.where(every == token, targets, -1))  # a load by an index of its own would wait once more
    byte = jax.lax.div(own, per_byte)
    shares = (targets >= 0) & (jax.lax.div(targets, per_byte) == byte)
    first = jnp.min(jnp.where(shares, every, num_new))
    channels = jnp.arange(power(size), dtype=jnp.int32)
    inside = channels < size

    def row(ref: jax.Ref, index: jax.Array, mask: jax.Array) -> jax.Array:
        found = pltriton.load(ref.at[index, channels], mask=mask, other=jnp.int8(0))
        return found.astype(jnp.int32)

    @pl.when((own >= 0) & (first == token))
    def _() -> None:
        bits = row(plane, byte, inside)
        for place in range(per_byte):
            index = jnp.max(jnp.where(targets == byte * per_byte + place, every, -1))
            new = row(fields, jnp.maximum(index, 0), inside & (index >= 0))
            mask = ones << (width * place)
            bits = jnp.where(index >= 0, (bits & ~mask) | ((new & ones) << (width * place)), bits)
        signed = ((bits & 255) ^ 128) - 128
        pltriton.store(done.at[byte, channels], signed.astype(jnp.int8), mask=inside)
