"""Encoding on an NVIDIA GPU: numbers are read once, and codes leave packed.

    grid (heads, rows of n tokens, groups of channels that share a scale)

    tokens     0 1 2 3 | 4 5 6 7 | ...       n = 8/b share a byte of the finest plane: field j is token n i + j of row i
    program    some rows; field after field: a tile of numbers `rows channels`, their scales, their codes, which are
               shifted to their place in the bytes that come out

Nothing is exchanged between channels or tokens but the sums and extremes that scales follow from. Where a group of
tokens shares a scale for each channel, a program has the whole group, and reads it twice. A transform that comes first
is XLA's matrix product.

Pallas has deprecated its Triton route since JAX 0.11: only the choice of `api.py` depends on this file.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas._gpu import MOST_ELEMENTS, not_a_gpu, power
from kernels_pallas.coded import plane_bits
from kernels_pallas.encode import reference
from kernels_pallas.encode.reference import SCALE_DTYPE, Rule, Table, Ways

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_TILE = 1 << 11  # numbers of a field, or of a group of tokens, of 128 threads
_MOST_SHARED = 1 << 14  # numbers of a group of tokens
_FEWEST_NUMBERS = 16  # of a token, or of a group of its channels
_MOST_NUMBERS = 1024
_INTEGERS = 1.5 * 2**23  # about it, float32 numbers are integers
_INTEGERS_BITS = 0x4B400000


def unsupported(
    shape: tuple[int, ...], dtype: Any, rule: Rule, device: str, *, basis: tuple[int, ...] | None = None
) -> str | None:
    """Why numbers cannot be encoded; None if they can.

    Args:
      shape: of the numbers, `B K S D`.
      dtype: of the numbers.
      rule: for their codes.
      device: kind of the device, e.g. "NVIDIA H200".
      basis: shape of the transform, or None.
    """
    if (reason := not_a_gpu(device)) is not None:
        return reason
    if dtype not in _DTYPES:
        return f"numbers are {jnp.dtype(dtype).name}"
    count = shape[-1] if basis is None else basis[-1]
    width, group = _width(count, rule), _group(rule)
    if power(width) != width or not _FEWEST_NUMBERS <= width <= _MOST_NUMBERS:
        return f"{width} numbers share a scale, no power of two from {_FEWEST_NUMBERS} to {_MOST_NUMBERS}"
    if group > 1 and (power(group) != group or group % _fields(rule) or group * count > _MOST_SHARED):
        return f"{group} tokens share scales: no power of two, or more than {_MOST_SHARED} numbers"
    return "there are 2**31 numbers or more" if math.prod(shape[:3]) * count >= MOST_ELEMENTS else None


def _width(count: int, rule: Rule) -> int:
    """Channels of a program, of so many."""
    return count if isinstance(rule, Table) or rule.channel_group is None else rule.channel_group


def _group(rule: Rule) -> int:
    """Tokens that share a scale."""
    return 1 if isinstance(rule, Table) else rule.token_group


def _fields(rule: Rule) -> int:
    """Tokens that share a byte of the finest plane."""
    return 8 // min(plane_bits(rule.bits))


@dataclasses.dataclass(frozen=True)
class Plan:
    """How numbers are cut.

    Attributes:
      fields: n, tokens of a row.
      rows: of a program.
      width: channels of a program.
      num_warps: of a program.
    """

    fields: int
    rows: int
    width: int
    num_warps: int


def plan_for(rule: Rule, *, num_slots: int, size: int) -> Plan:
    """A plan for S tokens of R numbers.

    Args:
      rule: one that is served.
      num_slots: S.
      size: R.
    """
    fields, width, group = _fields(rule), _width(size, rule), _group(rule)
    rows = group // fields if group > 1 else min(max(_TILE // width, 1), power(num_slots // fields))
    return Plan(fields, rows, width, num_warps=min(max(rows * width * 4 // _TILE, 1), 8))


def encode(
    numbers: Float[Array, "B K S D"],
    rule: Rule,
    *,
    basis: Float[Array, "... D R"] | None = None,
    interpret: Any = False,
) -> tuple[tuple[Int[Array, "B K _ R"], ...], Float[Array, "B K ..."], Float[Array, "B K ..."] | None]:
    """See `reference.encode`.

    Args:
      numbers: not `unsupported`.
      rule: for codes and scales.
      basis: `D R`, `K D R` or `B K D R`.
      interpret: run on any device, step by step.

    Returns:
      Planes of packed codes, and scales and offsets (or None) as they are stored: `B K S`, `B K C S` or `B K S/t R`.
    """
    if basis is not None:
        numbers = reference.transform(numbers.astype(jnp.float32), basis)
    batch, heads, num_slots, size = numbers.shape
    plan = plan_for(rule, num_slots=num_slots, size=size)
    in_fields = numbers.reshape(batch * heads, num_slots // plan.fields, plan.fields, size)
    *planes, facts = _call(in_fields, rule=rule, plan=plan, interpret=interpret)
    stored = tuple(plane.reshape(batch, heads, -1, size) for plane in planes)
    if _group(rule) > 1:
        shape: tuple[int, ...] = (batch, heads, -1, size)
    else:
        shape = (batch, heads, num_slots) if reference.by_token(rule) else (batch, heads, -1, num_slots)
    scale, *offset = (fact.reshape(shape) for fact in facts)
    return stored, scale, offset[0] if offset else None


def _call(numbers: Float[Array, "heads rows n R"], *, rule: Rule, plan: Plan, interpret: Any) -> tuple[Any, ...]:
    """Runs the kernel: planes `heads rows bytes R`, scales and offsets `heads C rows n` or `heads S/t R`."""
    heads, num_rows, _, size = numbers.shape
    groups, shared = size // plan.width, _group(rule) > 1

    def some_rows(entries: int) -> pl.BlockSpec:
        at = lambda row, head, group: (head, row, 0, group)  # noqa: E731
        return pl.BlockSpec((None, plan.rows, entries, plan.width), at)

    specs = [some_rows(plan.fields * bits // 8) for bits in plane_bits(rule.bits)]
    shapes = [
        jax.ShapeDtypeStruct((heads, num_rows, plan.fields * bits // 8, size), jnp.int8)
        for bits in plane_bits(rule.bits)
    ]
    if shared:
        spec = pl.BlockSpec((None, None, plan.width), lambda row, head, group: (head, row, group))
        fact = jax.ShapeDtypeStruct((heads, num_rows // plan.rows, size), SCALE_DTYPE)
    else:
        at = lambda row, head, group: (head, group, row, 0)  # noqa: E731
        spec = pl.BlockSpec((None, None, plan.rows, plan.fields), at)
        fact = jax.ShapeDtypeStruct((heads, groups, num_rows, plan.fields), SCALE_DTYPE)
    num_facts = 2 if isinstance(rule, reference.Integers) and not rule.symmetric else 1
    *planes, facts = pl.pallas_call(
        functools.partial(_kernel, rule=rule, plan=plan, num_rows=num_rows),
        grid=(pl.cdiv(num_rows, plan.rows), heads, groups),
        in_specs=[some_rows(plan.fields)],
        out_specs=[*specs, [spec] * num_facts],
        out_shape=[*shapes, [fact] * num_facts],
        compiler_params=pltriton.CompilerParams(num_warps=plan.num_warps, num_stages=1),
        interpret=interpret,
        name="encode",
    )(numbers)
    return (*planes, facts)


def _kernel(numbers: jax.Ref, *refs: Any, rule: Rule, plan: Plan, num_rows: int) -> None:
    """Some rows of a head's tokens."""
    *planes, facts = refs
    rows = pl.program_id(0) * plan.rows + jnp.arange(plan.rows, dtype=jnp.int32)
    inside = None if num_rows % plan.rows == 0 else rows < num_rows
    every = pl.ds(0, plan.rows)

    def read(field: int) -> jax.Array:
        return _load(numbers, inside, every, field).astype(jnp.float32)

    ways = Ways(round=_round)
    of_all = None
    if _group(rule) > 1:
        ends = [reference.ends_of(read(field), rule, axis=0) for field in range(plan.fields)]
        of_all = reference.scale_of(functools.reduce(reference.ends_of_both, ends), rule)
        for ref, found in zip(facts, of_all, strict=False):
            ref[...] = reference.to_scale(jnp.squeeze(found, 0))
    packed: list[dict[int, jax.Array]] = [{} for _ in planes]
    for field in range(plan.fields):
        if of_all is not None:
            codes = reference.integers(read(field), *of_all, rule=rule, ways=ways)
        else:
            codes, *of_token = reference.encode_token(read(field), rule, ways)
            for ref, found in zip(facts, of_token, strict=False):
                _store(ref, reference.to_scale(jnp.squeeze(found, 1)), inside, every, field)
        low = 0
        for bytes_, width in zip(packed, plane_bits(rule.bits), strict=True):
            byte, place = divmod(field * width, 8)
            part = ((codes >> low) & ((1 << width) - 1)) << place
            bytes_[byte] = part if byte not in bytes_ else bytes_[byte] | part
            low += width
    for plane, bytes_ in zip(planes, packed, strict=True):
        for byte, found in bytes_.items():
            _store(plane, ((found ^ 128) - 128).astype(jnp.int8), inside, every, byte)


def _round(numbers: jax.Array) -> jax.Array:
    """To the nearest integer, of two the even one, where it counts: what codes are cut to is far below 2**21.

    The route has no such operation. A float32 of that exponent has integers in its last bits; looked at as floats, the
    sum and the difference would be simplified away.
    """
    held = jnp.clip(numbers, -(2.0**21), 2.0**21) + _INTEGERS
    return (jax.lax.bitcast_convert_type(held, jnp.int32) - _INTEGERS_BITS).astype(jnp.float32)


def _load(ref: jax.Ref, inside: jax.Array | None, rows: Any, entry: int) -> jax.Array:
    """An entry of some rows, `rows R`; 0 in rows that are not inside."""
    at = ref.at[rows, jnp.int32(entry)]
    if inside is None:
        return pltriton.load(at)
    mask = jnp.broadcast_to(inside[:, None], at.shape)
    return pltriton.load(at, mask=mask, other=jnp.asarray(0, ref.dtype))


def _store(ref: jax.Ref, found: jax.Array, inside: jax.Array | None, rows: Any, entry: int) -> None:
    """Writes an entry of some rows."""
    mask = None
    if inside is not None:
        mask = inside if found.ndim == 1 else jnp.broadcast_to(inside[:, None], found.shape)
    pltriton.store(ref.at[rows, jnp.int32(entry)], found, mask=mask)
