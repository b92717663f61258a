"""The definition of the operation in plain jax.numpy.

    take    slots a b c d e f, index 0 2 3 5        ->   a c d f
    put     slots a b c d e f, new x y to 1 and 4   ->   a x c d y f

Where a byte holds several tokens and units are single slots, bytes are taken apart: `take` moves, unpacks and packs;
`put` rewrites the fields of each place in the byte in turn, so that two tokens of one byte may both be replaced.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from kernels_pallas.coded import Part, Parts, Rotated

MOST_NUMBERS = 1024
"""Of a token, which kernels write at once."""


def take_slots(parts: Parts, index: Int[Array, "B K units"], *, unit: int) -> Parts:
    """See `api.take_slots`."""
    index = jnp.maximum(index, 0)

    def take(array: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        shared = index.shape[1] // array.shape[1]
        tokens_third = jnp.moveaxis(array, axis, 2)  # B k entries ...
        return jnp.moveaxis(_take(tokens_third, index[:, ::shared], unit, entries), 2, axis)

    return tuple(finer(part.map_tokens(take), unit) for part in parts)


def finer(part: Part, unit: int) -> Part:
    """The same part; where a unit was cut out of a group that shares scales, units have scales of their own.

    Raises:
      ValueError: units are single slots, which would have a scale for every number.
    """
    if isinstance(part, Rotated):
        return dataclasses.replace(part, parts=tuple(finer(one, unit) for one in part.parts))
    if unit == 1 < part.token_group:
        raise ValueError(f"Single slots cannot be cut out of groups of {part.token_group} that share scales.")
    return dataclasses.replace(part, token_group=min(part.token_group, unit))


def _take(array: jax.Array, index: Int[Array, "B k units"], unit: int, entries: tuple[int, int]) -> jax.Array:
    """Units of `B k entries ...`; a token has numerator / denominator entries."""
    numerator, denominator = entries
    whole, rest = divmod(unit * numerator, denominator)
    if rest and _is_shared(array, unit, entries):
        return _take(array, index * unit // denominator, denominator, entries)
    if rest:  # several tokens of a byte may part
        single = index[..., None] * unit + jnp.arange(unit, dtype=jnp.int32).reshape(1, 1, 1, -1)
        return _take_fields(array, single, numerator)
    units = array.reshape(*array.shape[:2], -1, whole, *array.shape[3:])
    taken = jax.vmap(jax.vmap(lambda array, index: array[index]))(units, index)
    return taken.reshape(*array.shape[:2], -1, *array.shape[3:])


def _take_fields(
    plane: Int[Array, "B k bytes R"], slots: Int[Array, "B k units n"], width: int
) -> Int[Array, "B k _ R"]:
    """Fields of `width` bits out of the bytes that they lie in, one place of new bytes after another."""
    per_byte, packed = 8 // width, jnp.uint8(0)
    apart = slots.reshape(*slots.shape[:2], -1, per_byte)
    for place in range(per_byte):
        single = apart[..., place]
        rows = jax.vmap(jax.vmap(lambda array, index: array[index]))(plane, single // per_byte)
        shifts = (single % per_byte * width).astype(jnp.uint8)[..., None]
        packed = packed | (((rows.view(jnp.uint8) >> shifts) & ((1 << width) - 1)) << (width * place))
    return packed.view(jnp.int8)


def _is_shared(array: jax.Array, unit: int, entries: tuple[int, int]) -> bool:
    """Whether an array holds scales that a group of units shares, and not bytes that hold several tokens.

    Raises:
      ValueError: units cross the borders of groups.
    """
    if array.dtype == jnp.int8:
        return False
    if entries[1] % unit:
        raise ValueError(f"Units of {unit} slots cross the borders of groups of {entries[1]} that share scales.")
    return True


def put_slots(
    parts: Parts,
    new: Parts,
    slots: Int[Array, "B K units"],
    *,
    unit: int,
    put_fields: Callable[..., jax.Array] | None = None,
) -> Parts:
    """See `api.put_slots`; `put_fields`, if given, writes single slots into packed bytes."""

    def put(array: jax.Array, new: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        shared = slots.shape[1] // array.shape[1]
        if put_fields is not None and array.dtype == jnp.int8:
            width = entries[0]
            fields = new.view(jnp.uint8) if width == 8 else _spread(new, width)
            return put_fields(array, fields, slots[:, ::shared], width=width)
        old, fresh = jnp.moveaxis(array, axis, 2), jnp.moveaxis(new, axis, 2)
        return jnp.moveaxis(_put(old, fresh, slots[:, ::shared], unit, entries), 2, axis)

    return tuple(part.map_tokens(put, other) for part, other in zip(parts, new, strict=True))


def _put(
    old: jax.Array, new: jax.Array, slots: Int[Array, "B k units"], unit: int, entries: tuple[int, int]
) -> jax.Array:
    """Units of `new` written into `B k entries ...`."""
    numerator, denominator = entries
    whole, rest = divmod(unit * numerator, denominator)
    if rest and _is_shared(old, unit, entries):
        raise ValueError(
            f"Units of {unit} slots share scales with others, {denominator} together, and cannot be replaced."
        )
    if rest:  # several tokens of a byte may part
        single = slots[..., None] * unit + jnp.arange(unit, dtype=jnp.int32).reshape(1, 1, 1, -1)
        single = jnp.where(slots[..., None] >= 0, single, -1).reshape(*slots.shape[:2], -1)
        return _put_fields(old, _spread(new, numerator), single, numerator)
    units = old.reshape(*old.shape[:2], -1, whole, *old.shape[3:])
    fresh = new.reshape(*new.shape[:2], -1, whole, *new.shape[3:])
    places = jnp.where(slots >= 0, slots, units.shape[2])  # outside: dropped
    return _scatter(units, places, fresh).reshape(old.shape)


def _put_fields(
    plane: Int[Array, "B k bytes R"], fields: UInt8[Array, "B k U R"], slots: Int[Array, "B k U"], width: int
) -> Int[Array, "B k bytes R"]:
    """Fields of `width` bits written into packed bytes, those of one place in the byte after those of another."""
    per_byte, packed = 8 // width, plane.view(jnp.uint8)
    for place in range(per_byte):
        chosen = (slots >= 0) & (slots % per_byte == place)
        rows = jnp.where(chosen, slots // per_byte, 0)
        mask = jnp.uint8(((1 << width) - 1) << (width * place))
        old = jax.vmap(jax.vmap(lambda array, index: array[index]))(packed, rows)
        written = (old & ~mask) | (fields << (width * place))
        packed = _scatter(packed, jnp.where(chosen, rows, packed.shape[2]), written)
    return packed.view(jnp.int8)


def _scatter(array: jax.Array, places: Int[Array, "B k n"], rows: jax.Array) -> jax.Array:
    """Rows written at their places along axis 2; places beyond the end are dropped."""

    def one(array: jax.Array, places: jax.Array, rows: jax.Array) -> jax.Array:
        return array.at[places].set(rows, mode="drop")

    return jax.vmap(jax.vmap(one))(array, places, rows)


def _spread(plane: Int[Array, "B k bytes R"], width: int) -> UInt8[Array, "B k S R"]:
    """Packed fields of `width` bits, one a token, as uint8."""
    shifts = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(1, 1, 1, -1, 1)
    fields = (plane.view(jnp.uint8)[:, :, :, None] >> shifts) & ((1 << width) - 1)
    return fields.reshape(*plane.shape[:2], -1, plane.shape[3])


def byte_planes(parts: Parts) -> list[Any]:
    """The planes, arrays or their shapes, that are bytes: what `put_fields` writes."""
    found: list[Any] = []
    for part in parts:
        inner = byte_planes(part.parts) if isinstance(part, Rotated) else part.planes
        found += [plane for plane in inner if plane.dtype == jnp.int8]
    return found


def no_fields(parts: Parts, num_new: int, unit: int, *, most_new: int) -> str | None:
    """Why there is nothing for a kernel's `put_fields`, or more than it holds at once; None if there is.

    Args:
      parts: arrays, or their shapes.
      num_new: units that come.
      unit: slots that move together.
      most_new: tokens that the kernel takes.
    """
    if unit != 1:
        return f"units of {unit} slots move together"
    planes = byte_planes(parts)
    if not planes:
        return "there are no packed codes"
    if num_new > most_new:
        return f"{num_new} tokens come at once, more than {most_new}"
    most = max(plane.shape[3] for plane in planes)
    return f"tokens have {most} numbers, more than {MOST_NUMBERS}" if most > MOST_NUMBERS else None


def merge_heads(parts: Parts) -> Parts:
    """The slots of all heads as those of one: `B K S...` -> `B 1 K*S...`, head after head."""

    def merge(array: jax.Array, *, axis: int, entries: tuple[int, int]) -> jax.Array:
        del entries
        together = jnp.moveaxis(array, 1, axis - 1)  # ... K entries ...
        sizes = together.shape
        merged = together.reshape(*sizes[: axis - 1], sizes[axis - 1] * sizes[axis], *sizes[axis + 1 :])
        return merged[:, None]

    return tuple(part.map_tokens(merge) for part in parts)
