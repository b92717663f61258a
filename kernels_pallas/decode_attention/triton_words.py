"""Codes and 8-bit floats to float16 on NVIDIA GPUs, two channels an element: tiles are int16 `I R/2`, as they lie.

    element   the bytes of channels 2c (low) and 2c + 1 (high); of 4 bits, each with two tokens:

                15      12 11       8 7        4 3        0
               | 2c+1,t+1 |  2c+1,t  |  2c,t+1  |   2c,t   |

    number    a code's bits at the low end of a float16 are a multiple of 2**-24, however few: turn the sign bit of the
              codes, keep the bits of one, and a multiply-add makes (code + shift) 2**-9 of them, exactly

Even and odd channels are tiles of their own, which a product multiplies apart. As an element has 16 bits, tiles go
through the chip's transposing loads like floats, and as two share a register, one instruction works on two codes: for
4 bits 10 instructions make 8 of them. An instruction takes but one constant: what needs two, such as keeping bits and
setting others, costs a move more. Left to itself a compiler takes six instructions a code, one code at a time: hence
inline PTX on the device, and the same steps in JAX for the interpreter.
"""

import dataclasses
import functools
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from kernels_pallas.coded import Coded, plane_bits

UNIT = 2.0**-9
"""What 1 becomes; the largest float16, about 2**16, makes no more of 2**-24."""

_DIGITS = 10  # below the exponent of a float16
_MOST_LEVELS = 16  # an instruction picks four bytes out of eight


class Move(NamedTuple):
    """Bits of one plane on their way to where they count.

    Attributes:
      plane: which.
      up: how far; negative is down.
      mask: what is kept, afterwards.
    """

    plane: int
    up: int
    mask: int


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What makes an element of one channel of one token a float16 number.

    Attributes:
      flips: bits that are turned first, of each plane.
      moves: bits that are put together.
      factor: of the float16 number that this is.
      term: added.
    """

    flips: tuple[int, ...]
    moves: tuple[Move, ...]
    factor: float
    term: float = 0.0


@dataclasses.dataclass(frozen=True)
class LookUp:
    """What finds the levels of an element's codes, which come from two channels, though one is asked for.

    Attributes:
      moves: bits of codes that are put together, at the low end of each byte.
      levels: of each code without a sign.
      parity: which of the two channels.
    """

    moves: tuple[Move, ...]
    levels: tuple[float, ...]
    parity: int


def possible(part: Coded) -> bool:
    """Whether a part is read like this: codes of at most 16 levels, or that stand for themselves, or 8-bit floats."""
    if part.levels is not None:
        return len(part.levels) <= _MOST_LEVELS
    return part.bits is not None or bool(part.dtype)


def recipe_for(part: Coded, entry: int, parity: int) -> Recipe | LookUp:
    """The fewest instructions for a token and the even or odd channels.

    Args:
      part: one for which this is `possible`.
      entry: of the tokens that share a byte of the finest plane, which.
      parity: 0 for channel 2c, 1 for 2c + 1.
    """
    if part.dtype:
        return _of_float8(part.dtype, parity)
    if part.levels is not None:
        return LookUp(moves_of(part, entry), levels_of(part), parity)
    return min((_of_code(part, entry, parity, up) for up in range(_DIGITS + 1 - part.bits)), key=_cost)


def _of_code(part: Coded, entry: int, parity: int, up: int) -> Recipe:
    """With the lowest bit at bit `up`."""
    widths = plane_bits(part.bits)
    signs = sum(1 << bit for bit in range(widths[-1] - 1, 16, widths[-1]))
    half = 1 << (part.bits - 1)
    moves = moves_of(part, entry, byte=parity, up=up)
    return Recipe((*(0 for _ in widths[1:]), signs), moves, 2.0 ** (24 - up) * UNIT, (part.shift - half) * UNIT)


def moves_of(part: Coded, entry: int, *, byte: int = 0, up: int = 0) -> tuple[Move, ...]:
    """What brings a token's code together from all planes.

    Args:
      part: of codes.
      entry: of the tokens that share a byte of the finest plane, which.
      byte: of an element, where the code lies.
      up: where its lowest bit goes.
    """
    moves = []
    for plane, width in enumerate(plane_bits(part.bits)):
        moves.append(Move(plane, up - (8 * byte + entry * width % 8), ((1 << width) - 1) << up))
        up += width
    return tuple(moves)


def levels_of(part: Coded) -> tuple[float, ...]:
    """What codes of a table stand for, by their bits without a sign."""
    half = len(part.levels) // 2
    return tuple(level + part.shift for level in part.levels[half:] + part.levels[:half])


def _cost(recipe: Recipe) -> tuple[int, int]:
    """Shifts; among as few, those that other tokens and channels want as well."""
    shifts = [move.up for move in recipe.moves if move.up]
    return len(shifts), sum(up != -8 for up in shifts)


def _of_float8(name: str, parity: int) -> Recipe:
    """No value is lost; what was NaN in float8_e4m3fn is 480."""
    down = 8 * parity  # the byte's place; it goes to bit 8
    if name == "float8_e5m2":
        return Recipe((0,), (Move(0, 8 - down, 0xFF00),), 1.0)
    # The sign stays before an exponent that is one longer, and counts from 8 less.
    return Recipe((0,), (Move(0, 8 - down, 0x8000), Move(0, 7 - down, 0x3F80)), 256.0)


def numbers(
    planes: tuple[Int[Array, "slots R"], ...], recipe: Recipe | LookUp, *, interpret: bool
) -> Float[Array, "slots R"]:
    """The numbers of one channel of each element; codes that stand for themselves in `UNIT`s.

    Args:
      planes: int16 tiles, the low bits' plane first.
      recipe: see `recipe_for`.
      interpret: where there is no such device.
    """
    if isinstance(recipe, LookUp):
        return _levels_by_jax(planes, recipe) if interpret else _levels_by_ptx(planes, recipe)
    return _by_jax(planes, recipe) if interpret else _by_ptx(planes, recipe)


def together(words: list[Int[Array, "slots R"]], moves: tuple[Move, ...]) -> Int[Array, "slots R"]:
    """Bits of int32 words of each plane, moved."""

    def moved(move: Move) -> jax.Array:
        word = words[move.plane]
        return (word << move.up if move.up >= 0 else word >> -move.up) & move.mask

    return functools.reduce(jnp.bitwise_or, map(moved, moves))


def _by_jax(planes: tuple[jax.Array, ...], recipe: Recipe) -> jax.Array:
    words = [plane.astype(jnp.int32) ^ flip for plane, flip in zip(planes, recipe.flips, strict=True)]
    whole = together(words, recipe.moves)
    if all(move.mask < 1 << _DIGITS for move in recipe.moves):  # a CPU may take such small floats for 0
        return (whole.astype(jnp.float32) * (recipe.factor * 2.0**-24) + recipe.term).astype(jnp.float16)
    return jax.lax.bitcast_convert_type(whole.astype(jnp.int16), jnp.float16) * jnp.float16(recipe.factor)


def _by_ptx(planes: tuple[jax.Array, ...], recipe: Recipe) -> jax.Array:
    """Two elements a register; bits that a shift takes from one to the other are masked."""
    lines = [".reg .b32 word, whole, factor, term;"]
    for index, move in enumerate(recipe.moves):
        lines.append(f"xor.b32 word, ${1 + move.plane}, {_both(recipe.flips[move.plane])};")
        lines.append(f"{'shl' if move.up > 0 else 'shr'}.b32 word, word, {abs(move.up)};")
        lines.append(f"and.b32 word, word, {_both(move.mask)};")
        lines.append("or.b32 whole, whole, word;" if index else "mov.b32 whole, word;")
    lines.append(f"mov.b32 factor, {_both(_as_bits(recipe.factor))};")
    lines.append(f"mov.b32 term, {_both(_as_bits(recipe.term))};")
    lines.append("fma.rn.f16x2 $0, whole, factor, term;")
    return _in_registers(lines, planes)


def _in_registers(lines: list[str], planes: tuple[jax.Array, ...]) -> jax.Array:
    """Runs PTX on registers of two elements."""
    (found,) = pltriton.elementwise_inline_asm(
        "{ " + " ".join(lines) + " }",
        args=list(planes),
        constraints=",".join(["=r", *["r"] * len(planes)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(planes[0].shape, jnp.float16)],
    )
    return found


def _levels_by_jax(planes: tuple[jax.Array, ...], recipe: LookUp) -> jax.Array:
    codes = together([plane.astype(jnp.int32) >> (8 * recipe.parity) for plane in planes], recipe.moves)
    found = jnp.zeros(codes.shape, jnp.float32)
    for code, level in enumerate(recipe.levels):
        found = jnp.where(codes == code, level, found)
    return found.astype(jnp.float16)


def _levels_by_ptx(planes: tuple[jax.Array, ...], recipe: LookUp) -> jax.Array:
    """Four codes at a time: the low and the high bytes of their levels, of which two make the numbers.

    `prmt` picks a byte out of eight for each of four digits of base 16, here the codes; with more than eight levels
    there are two choices, between which a code's fourth bit decides.
    """
    lines = [".reg .b32 word, codes, digits, upper, low, high, other, first, second;"]
    for index, move in enumerate(recipe.moves):
        lines.append(f"{'shl' if move.up > 0 else 'shr'}.b32 word, ${1 + move.plane}, {abs(move.up)};")
        lines.append(f"and.b32 word, word, {_four_times(move.mask)};")
        lines.append("or.b32 codes, codes, word;" if index else "mov.b32 codes, word;")
    lines += ["shr.b32 word, codes, 4;", "or.b32 word, word, codes;", "prmt.b32 digits, word, 0, 0x4420;"]
    bits = [*map(_as_bits, recipe.levels), *[0] * (8 - len(recipe.levels))]
    if len(bits) > 8:
        lines += ["and.b32 digits, digits, 0x7777;", "shl.b32 word, codes, 4;", "prmt.b32 upper, word, 0, 0xba98;"]
    for name, byte in (("low", 0), ("high", 8)):
        lines += _pick(name, [level >> byte & 0xFF for level in bits])
    pair = "0x7351" if recipe.parity else "0x6240"
    lines.append(f"prmt.b32 $0, low, high, {pair};")
    return _in_registers(lines, planes)


def _pick(name: str, table: list[int]) -> list[str]:
    """One byte of a table for each digit."""

    def word(start: int) -> str:
        return f"0x{sum(byte << 8 * place for place, byte in enumerate(table[start : start + 4])):08x}"

    lines = []
    for target, start in zip((name, "other"), range(0, len(table), 8), strict=False):
        lines += [f"mov.b32 first, {word(start)};", f"mov.b32 second, {word(start + 4)};"]
        lines.append(f"prmt.b32 {target}, first, second, digits;")
    if len(table) > 8:  # the other where `upper` has ones
        lines.append(f"lop3.b32 {name}, {name}, other, upper, 0xd8;")
    return lines


def _both(bits: int) -> str:
    """The same 16 bits twice."""
    return f"0x{bits << 16 | bits:08x}"


def _four_times(bits: int) -> str:
    """The same 8 bits four times."""
    return f"0x{bits * 0x01010101:08x}"


def _as_bits(number: float) -> int:
    """The nearest float16's bits."""
    return struct.unpack("<H", struct.pack("<e", number))[0]
