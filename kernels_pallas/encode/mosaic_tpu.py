"""Encoding on a TPU: numbers are read once, and codes leave packed.

    grid (some heads, some tokens), in each step a loop over 128 tokens at a time: numbers `128 R`, a token a sublane

What a token's numbers come to (lengths, largest, scales) is left in a column, one of eight tokens in a register. It is
gathered into a row, all 128 in one register, where square roots and quotients cost next to nothing, and spread again:

    column  a . .    diagonal    a . .    sum down      a b c   row
            b . .   -------->    . b .   --------->
            c . .                . . c   <--------- broadcast, the diagonal, sum along

Where groups of a token's channels share a scale, numbers are turned, channels on sublanes, and each group has a row.
What tokens share in a channel lies where it is used.

Adjacent tokens share a byte, which is how int4 and int2 lie in registers: their bits are bytes for nothing.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas._tpu import LANES, ROWS, VMEM, not_a_tpu
from kernels_pallas.coded import plane_bits
from kernels_pallas.encode import reference
from kernels_pallas.encode.reference import LARGEST_SCALE, Integers, Rule, Table, Ways

_STEP_NUMBERS = 1 << 18  # of a step: 1 MiB
_UNROLL = 2
_MOST_BASIS = 1 << 21  # numbers of a step's transforms: 16 MiB, twice
_MOST_NUMBERS = 1024  # of a token
_DTYPES = (jnp.float32, jnp.bfloat16)


def unsupported(
    shape: tuple[int, ...], dtype: Any, rule: Rule, device: str, *, basis: tuple[int, ...] | None = None
) -> str | None:
    """Why numbers cannot be encoded; None if they can.

    Args:
      shape: of the numbers, `B K S D`.
      dtype: of the numbers.
      rule: for their codes.
      device: kind of the device, e.g. "TPU v6 lite".
      basis: shape of the transform, or None.
    """
    if (reason := not_a_tpu(device)) is not None:
        return reason
    tokens, channels = shared(rule)
    if tokens > 1 and (tokens % ROWS or LANES % tokens):
        return f"{tokens} tokens share scales, and not 8, 16, 32, 64 or 128"
    width = shape[-1] if basis is None else basis[-1]
    if channels is not None and (channels % ROWS or width % channels):
        return f"groups of {channels} channels, of {width}, are no multiples of {ROWS} that make these up"
    if dtype not in _DTYPES:
        return f"numbers are {jnp.dtype(dtype).name}"
    if max(shape[-1], *(basis or ())[-2:], 0) > _MOST_NUMBERS:
        return f"tokens have more than {_MOST_NUMBERS} numbers"
    if basis is not None and math.prod(basis) > _MOST_BASIS:
        return f"its transforms have {math.prod(basis)} numbers, more than {_MOST_BASIS}"
    if basis is not None and len(basis) > 3:
        return "each sequence has a transform of its own"
    return None


def shared(rule: Rule) -> tuple[int, int | None]:
    """Tokens that share a channel's scale, or 1, and channels that share a token's, or None for all."""
    return (1, None) if isinstance(rule, Table) else (rule.token_group, rule.channel_group)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How numbers are cut.

    Attributes:
      tokens: of a step, of each head.
      heads: of a step.
      piece: tokens that are encoded together.
    """

    tokens: int
    heads: int
    piece: int


def blocks_for(bits: int, *, num_slots: int, num_heads: int, size: int) -> Blocks:
    """Steps of a MiB: long ones of one head, or several heads.

    Args:
      bits: of a code.
      num_slots: S, in whole pieces.
      num_heads: K.
      size: D.
    """
    # A tile of bytes has 32 rows, which takes 256 tokens of the narrowest plane if that is one bit wide.
    piece = piece_of(bits)
    tokens = max(_STEP_NUMBERS // max(size, LANES) // 1024, 1) * 1024
    if num_slots > tokens:
        return Blocks(tokens=tokens, heads=1, piece=piece)
    heads = tokens // num_slots
    return Blocks(tokens=num_slots, heads=max(n for n in range(1, heads + 1) if num_heads % n == 0), piece=piece)


def unrolled(count: int) -> int:
    """Pieces that are written out together, of so many: one's reductions hide behind the other's arithmetic."""
    return math.gcd(count, _UNROLL)


def piece_of(bits: int) -> int:
    """Tokens that fill whole tiles of packed bytes."""
    return max(LANES, 256 // plane_bits(bits)[-1])


def encode(
    numbers: Float[Array, "B K S D"],
    rule: Rule,
    *,
    basis: Float[Array, "... D R"] | None = None,
    interpret: Any = False,
) -> tuple[tuple[Int[Array, "B K _ R"], ...], Float[Array, "B K ..."], Float[Array, "B K ..."] | None]:
    """See `reference.encode`.

    Args:
      numbers: float32 or bfloat16, not `unsupported`.
      rule: for codes and scales.
      basis: `D R` or `K D R`.
      interpret: run on any device, step by step; True, or how (`pltpu.InterpretParams`).

    Returns:
      Planes of packed codes, and scales and offsets (or None) in float32, to be rounded: `B K S`, `B K C S` or
      `B K S/t R`.
    """
    batch, heads, num_slots, size = numbers.shape
    beside = -num_slots % piece_of(rule.bits)
    numbers = jnp.pad(numbers, [(0, 0), (0, 0), (0, beside), (0, 0)])
    blocks = blocks_for(rule.bits, num_slots=num_slots + beside, num_heads=heads, size=size)
    flat = numbers.reshape(batch * heads, num_slots + beside, size)
    if basis is not None:
        basis = basis.astype(jnp.float32).reshape(-1, *basis.shape[-2:])  # 1|K D R
    *planes, facts = _call(flat, basis, rule=rule, blocks=blocks, heads_of_row=heads, interpret=interpret)

    def stored(fact: jax.Array) -> jax.Array:
        if (tokens := shared(rule)[0]) > 1:
            return fact.reshape(batch, heads, *fact.shape[1:])[:, :, : num_slots // tokens]
        of_groups = fact.reshape(batch, heads, fact.shape[1], -1)[..., :num_slots]
        return of_groups[:, :, 0] if reference.by_token(rule) else of_groups

    unpadded = tuple(
        plane.reshape(batch, heads, *plane.shape[1:])[:, :, : num_slots * width // 8]
        for plane, width in zip(planes, plane_bits(rule.bits), strict=True)
    )
    return unpadded, stored(facts[0]), None if facts.shape[0] == 1 else stored(facts[1])


def _call(
    numbers: Float[Array, "heads S D"],
    basis: Float[Array, "k D R"] | None,
    *,
    rule: Rule,
    blocks: Blocks,
    heads_of_row: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Runs the kernel: planes `heads S*w/8 R`, and facts `1|2 heads C S/128 128`, or `1|2 heads S/t R`."""
    num_heads, num_slots, size = numbers.shape
    width = size if basis is None else basis.shape[2]
    in_specs = [pl.BlockSpec((blocks.heads, blocks.tokens, size), lambda head, block: (head, block, 0))]
    if basis is not None:
        own = basis.shape[0] > 1
        per_row = heads_of_row // blocks.heads

        def at(head: jax.Array, block: jax.Array) -> tuple[jax.Array | int, int, int]:
            del block
            return jax.lax.rem(head, per_row) if own else 0, 0, 0

        in_specs.append(pl.BlockSpec((blocks.heads if own else 1, size, width), at))
    out_specs, out_shape = [], []
    for bits in plane_bits(rule.bits):
        rows = blocks.tokens * bits // 8
        out_specs.append(pl.BlockSpec((blocks.heads, rows, width), lambda head, block: (head, block, 0)))
        out_shape.append(jax.ShapeDtypeStruct((num_heads, num_slots * bits // 8, width), jnp.int8))
    spec, shape = _facts_of(rule, blocks, num_heads, num_slots, width)
    out_specs.append(spec)
    out_shape.append(shape)
    unroll = 1 if interpret else unrolled(blocks.heads * blocks.tokens // blocks.piece)
    call = pl.pallas_call(
        functools.partial(_kernel, rule=rule, piece=blocks.piece, unroll=unroll, transformed=basis is not None),
        grid=(num_heads // blocks.heads, pl.cdiv(num_slots, blocks.tokens)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="encode",
    )
    return tuple(call(numbers, *([] if basis is None else [basis])))


def _facts_of(
    rule: Rule, blocks: Blocks, num_heads: int, num_slots: int, width: int
) -> tuple[pl.BlockSpec, jax.ShapeDtypeStruct]:
    """Scales, and offsets where there are any."""
    count = 2 if isinstance(rule, Integers) and not rule.symmetric else 1
    tokens, channels = shared(rule)
    if tokens > 1:
        spec = pl.BlockSpec((count, blocks.heads, blocks.tokens // tokens, width), lambda head, at: (0, head, at, 0))
        return spec, jax.ShapeDtypeStruct((count, num_heads, num_slots // tokens, width), jnp.float32)
    groups = width // (channels or width)
    of_step = (count, blocks.heads, groups, blocks.tokens // LANES, LANES)
    spec = pl.BlockSpec(of_step, lambda head, at: (0, head, 0, at, 0))
    return spec, jax.ShapeDtypeStruct((count, num_heads, groups, num_slots // LANES, LANES), jnp.float32)


def _kernel(numbers: jax.Ref, *refs: jax.Ref, rule: Rule, piece: int, unroll: int, transformed: bool) -> None:
    """Some tokens of some heads, a piece at a time."""
    basis, (*planes, facts) = (refs[0], refs[1:]) if transformed else (None, refs)
    num_heads, num_tokens, _ = numbers.shape
    per_head = num_tokens // piece

    def encode_piece(index: jax.Array, _: None) -> None:
        head, place = jax.lax.div(index, per_head), jax.lax.rem(index, per_head)
        codes = []
        for offset in range(piece // LANES):
            start = place * piece + offset * LANES
            some = numbers[head, pl.ds(pl.multiple_of(start, LANES), LANES), :].astype(jnp.float32)
            if basis is not None:
                matrix = basis[head if basis.shape[0] > 1 else 0]
                some = jnp.dot(some, matrix, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
            code, found = _encode(some, rule)
            codes.append(code)
            for fact in range(facts.shape[0]):
                _write(facts, found[fact], fact, head, place * (piece // LANES) + offset)
        together = codes[0] if len(codes) == 1 else jnp.concatenate(codes, axis=0)
        low = 0
        for plane, width in zip(planes, plane_bits(rule.bits), strict=True):
            rows = piece * width // 8
            packed = _pack(together, low=low, width=width, last=low + width == rule.bits)
            plane[head, pl.ds(pl.multiple_of(place * rows, rows), rows), :] = packed
            low += width

    jax.lax.fori_loop(0, num_heads * per_head, encode_piece, None, unroll=unroll)


def _encode(numbers: Float[Array, "128 R"], rule: Rule) -> tuple[Int[Array, "128 R"], list[Any]]:
    """Codes of 128 tokens, and their scales and offsets: rows of tokens `C 128`, or `128/t R`."""
    if reference.by_token(rule):
        code, *found = reference.encode_token(numbers, rule, Ways(_gather, _spread, _as_half))
        return code, found
    tokens, channels = shared(rule)
    turned = numbers if tokens > 1 else numbers.T
    grouped = turned.reshape(-1, tokens if tokens > 1 else channels, turned.shape[1])
    scale, offset = reference.scale_of(reference.ends_of(grouped, rule, axis=1), rule)
    codes = reference.integers(grouped, scale, offset, rule=rule, ways=Ways(read_scale=_as_half)).reshape(turned.shape)
    found = [scale[:, 0], None if offset is None else offset[:, 0]]
    return codes if tokens > 1 else codes.T, found


def _write(facts: jax.Ref, found: Float[Array, "rows _"], fact: int, head: jax.Array, place: jax.Array) -> None:
    """Scales or offsets of the tokens of a place, 128 of them each."""
    for row in range(found.shape[0]):
        if len(facts.shape) == 5:
            facts[fact, head, row, pl.ds(place, 1), :] = found[row : row + 1]
        else:
            facts[fact, head, pl.ds(place * found.shape[0] + row, 1), :] = found[row : row + 1]


def _diagonal() -> jax.Array:
    """Where token and lane are the same, `128 128`."""
    token, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return token == lane


def _gather(column: Float[Array, "128 1"]) -> Float[Array, "1 128"]:
    """Facts of 128 tokens on lanes."""
    return jnp.sum(jnp.where(_diagonal(), column, 0.0), axis=0, keepdims=True)


def _spread(row: Float[Array, "1 128"]) -> Float[Array, "128 1"]:
    """Facts of 128 tokens on sublanes."""
    return jnp.sum(jnp.where(_diagonal(), row, 0.0), axis=1, keepdims=True)


def _as_half(scale: jax.Array) -> jax.Array:
    """A float32 that is not negative, as a float16 holds it: to the nearest, of two the even one.

    Kernels know no float16. Of a normal one the 13 last bits are rounded off; those below 2**-14 are multiples of
    2**-24.
    """
    held = jnp.minimum(scale, LARGEST_SCALE)
    bits = jax.lax.bitcast_convert_type(held, jnp.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    normal = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    small = jnp.round(held * math.ldexp(1.0, 24)) * math.ldexp(1.0, -24)
    return jnp.where(held < math.ldexp(1.0, -14), small, normal)


_CODES = {8: jnp.int8, 4: jnp.int4, 2: jnp.int2}


def _pack(codes: Int[Array, "U R"], *, low: int, width: int, last: bool) -> Int[Array, "_ R"]:
    """The plane of some bits of each code as bytes: see `coded.pack`."""
    part = codes >> low
    if width == 1:
        return _pack_bits(part & 1)
    if not last:  # as a number of so many bits, for what is beyond need not be cut off
        half = 1 << (width - 1)
        part = ((part & (2 * half - 1)) ^ half) - half
    narrow = part.astype(_CODES[width])
    return narrow if width == 8 else pltpu.bitcast(narrow, jnp.int8)


def _pack_bits(bits: Int[Array, "U R"]) -> Int[Array, "_ R"]:
    """Eight tokens in a byte: four bytes of a word are folded into its lowest, twice over."""
    words = pltpu.bitcast(bits.astype(jnp.int8), jnp.int32)  # a byte a token
    words = words | (words >> 7)
    words = (words | (words >> 14)) & 15
    words = pltpu.bitcast(words.astype(jnp.int8), jnp.int32)  # four bits a byte
    words = (words | (words >> 4)) & 0xFF00FF
    words = words | (words >> 8)
    return pltpu.bitcast((words & 0xFFFF).astype(jnp.int16), jnp.int8)
