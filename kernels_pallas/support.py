"""Which implementation of each operation runs on what: the answers of the automatic choice, as a table.

python -m kernels_pallas.support              # the table of README.md
python -m kernels_pallas.support --reasons    # and why nothing better serves
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas._dispatch import Choice
from kernels_pallas.coded import Coded, Part, Parts, Rotated, plane_bits
from kernels_pallas.decode_attention import api as decode_attention
from kernels_pallas.decode_attention.reference import Segment
from kernels_pallas.encode import api as encode
from kernels_pallas.encode.reference import Integers, Rule, Table
from kernels_pallas.score import api as score
from kernels_pallas.score.reference import StoredKeys
from kernels_pallas.select import api as select
from kernels_pallas.slots import api as slots

DEVICES = {
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "H200": "NVIDIA H200",
    "CPU": "cpu",
}
"""Column of the table -> kind of the device, as JAX names it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of arguments.

    Attributes:
      operation: name.
      what: the arguments, for people.
      choose: device kind -> what the automatic choice is.
    """

    operation: str
    what: str
    choose: Callable[[str], Choice]


def _floats(dtype: str, shape: tuple[int, ...]) -> Coded:
    if dtype.startswith("float8"):
        return Coded(planes=(jax.ShapeDtypeStruct(shape, jnp.int8),), dtype=dtype)
    return Coded(planes=(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)),))


def _codes(bits: int, shape: tuple[int, ...], *, group: int = 1, table: bool = False, offset: bool = False) -> Coded:
    batch, heads, slots, size = shape
    planes = tuple(
        jax.ShapeDtypeStruct((batch, heads, slots * width // 8, size), jnp.int8) for width in plane_bits(bits)
    )
    scale = jax.ShapeDtypeStruct(
        (batch, heads, slots // group, size) if group > 1 else (batch, heads, slots), jnp.float16
    )
    levels = tuple(float(level) for level in range(1 << bits)) if table else None
    return Coded(
        planes=planes,
        scale=scale,
        offset=scale if offset else None,
        bits=bits,
        levels=levels,
        shift=0.0 if table else 0.5,
        token_group=group,
    )


def _attention(
    what: str,
    keys: Callable[[tuple[int, ...]], Part | Parts],
    values: Callable[[tuple[int, ...]], Part | Parts] | None = None,
    *,
    size: int = 128,
    value_size: int | None = None,
    heads: int = 8,
    group: int = 4,
    tokens: int = 1,
    pool: bool = False,
    mass: bool = False,
    page: int = 0,
) -> Row:
    """Attention of some tokens over 4,096 slots of one kind, or its masses; or over a quarter of them in pages."""
    slots, stored = 4096, 1 if pool else heads
    positions = jax.ShapeDtypeStruct((1, 1, slots), jnp.int32)
    segment = Segment(
        queries=jax.ShapeDtypeStruct((1, tokens, heads * group, size), jnp.bfloat16),
        keys=_as_parts(keys((1, stored, slots, size))),
        values=_as_parts((values or keys)((1, stored, slots, value_size or size))),
        positions=positions,
        owners=positions if pool else None,
        num_kv_heads=heads,
    )
    if page:
        own = (jax.ShapeDtypeStruct((1, heads, count), jnp.int32) for count in (slots // 4, slots // 4 // page))
        segment = dataclasses.replace(segment, **dict(zip(("positions", "pages"), own, strict=True)), page=page)
    return Row("decode_attention", what, lambda device: decode_attention.choose_for(segment, device, mass=mass))


def _as_parts(made: Part | Parts) -> Parts:
    return made if isinstance(made, tuple) else (made,)


def _turned(shape: tuple[int, ...]) -> Rotated:
    return Rotated(parts=(_codes(4, shape),), basis=None, mean=None, frequencies=(0.0,) * (shape[3] // 2))


def rows() -> tuple[Row, ...]:
    """The table, row by row."""
    kinds = [
        _attention("bfloat16", lambda shape: _floats("bfloat16", shape)),
        _attention("float32", lambda shape: _floats("float32", shape)),
        _attention("8-bit floats", lambda shape: _floats("float8_e4m3fn", shape)),
        *[_attention(f"{bits} bits", lambda shape, bits=bits: _codes(bits, shape)) for bits in (8, 4, 2)],
        _attention("keys 4 bits, values 2", lambda shape: _codes(4, shape), lambda shape: _codes(2, shape)),
        *[
            _attention(f"{bits} bits, a table of levels", lambda shape, bits=bits: _codes(bits, shape, table=True))
            for bits in (4, 3, 2)
        ],
        _attention("3 bits", lambda shape: _codes(3, shape)),
        _attention("4 bits with offsets", lambda shape: _codes(4, shape, offset=True)),
        _attention(
            "keys by channel (KIVI)",
            lambda shape: _codes(2, shape, group=32, offset=True),
            lambda shape: _codes(2, shape, offset=True),
        ),
        _attention("two parts of 4 bits", lambda shape: (_codes(4, shape), _codes(4, shape))),
        _attention(
            "keys bfloat16, values 4 bits", lambda shape: _floats("bfloat16", shape), lambda shape: _codes(4, shape)
        ),
        _attention("keys from before RoPE", _turned, lambda shape: _codes(4, shape)),
        _attention("a pool that heads share", lambda shape: _codes(4, shape), pool=True),
        _attention("bfloat16, pages of 16", lambda shape: _floats("bfloat16", shape), page=16),
        _attention("4 bits, pages of 16", lambda shape: _codes(4, shape), page=16),
        _attention("4 bits, heads of 64, pages of 16", lambda shape: _codes(4, shape), size=64, page=16),
    ]
    shapes = [
        *[
            _attention(f"4 bits, heads of {size}", lambda shape: _codes(4, shape), size=size)
            for size in (64, 80, 96, 256)
        ],
        _attention(
            "bfloat16, one head of 512 + 64",
            lambda shape: _floats("bfloat16", shape),
            size=576,
            value_size=512,
            heads=1,
            group=16,
        ),
        _attention("4 bits, 16 tokens", lambda shape: _codes(4, shape), tokens=16),
        _attention("4 bits, 64 tokens", lambda shape: _codes(4, shape), tokens=64),
        _attention("attention mass, bfloat16", lambda shape: _floats("bfloat16", shape), mass=True),
        _attention("attention mass, 4 bits", lambda shape: _codes(4, shape), mass=True),
    ]
    return (*kinds, *shapes, *_others())


def _others() -> tuple[Row, ...]:
    """Encoding, selecting and moving, on one device."""
    numbers = jax.ShapeDtypeStruct((1, 8, 128, 128), jnp.float32)

    def encoding(what: str, rule: Rule, basis: Any = None) -> Row:
        return Row("encode", what, lambda device: encode.choose_for(numbers, rule, device, basis=basis))

    def scoring(what: str, part: Part, basis: tuple[int, ...] | None = None) -> Row:
        matrix = None if basis is None else jax.ShapeDtypeStruct(basis, jnp.float32)
        positions = jax.ShapeDtypeStruct((1, 8, 4096), jnp.int32)
        keys = StoredKeys(parts=(part,), positions=positions, num_kv_heads=8, basis=matrix)
        return Row("score", what, lambda device: score.choose_for(keys, 32, device))

    def putting(what: str, part: Coded, unit: int = 1) -> Row:
        return Row("slots", what, lambda device: slots.choose_put_for((part,), 128, device, unit=unit))

    def selecting(count: int) -> Row:
        return Row("select", f"{count:,} slots a row", lambda device: select.choose_for((64, count), device))

    shape = (1, 8, 4096, 128)
    levels = tuple((index + 0.5) / 8 for index in range(-8, 8))
    return (
        encoding("8 bits", Integers(bits=8, symmetric=True)),
        encoding("4 bits, rotated first", Table(levels=levels), jax.ShapeDtypeStruct((8, 128, 128), jnp.float32)),
        encoding("by channel of 32 tokens (KIVI)", Integers(bits=2, token_group=32)),
        scoring("bfloat16", _floats("bfloat16", shape)),
        scoring("4 bits, rotated", _codes(4, shape), (128, 128)),
        scoring("4 bits, each head its own transform", _codes(4, shape), (8, 128, 128)),
        scoring("keys by channel (KIVI)", _codes(2, shape, group=32, offset=True)),
        scoring("keys from before RoPE", _turned(shape)),
        selecting(16_384),
        selecting(1_048_576),
        putting("single tokens put, 4 bits", _codes(4, shape)),
        putting("groups of 32 put", _codes(2, shape, group=32), unit=32),
    )


def table() -> str:
    """The table in Markdown."""
    lines = [f"| operation | arguments | {' | '.join(DEVICES)} |", "| --- | --- |" + " --- |" * len(DEVICES)]
    for row in rows():
        names = [row.choose(kind).name for kind in DEVICES.values()]
        lines.append(f"| `{row.operation}` | {row.what} | {' | '.join(names)} |")
    return "\n".join(lines)


def reasons() -> str:
    """Why an implementation does not serve, a line for each row and device."""
    lines = []
    for row in rows():
        for name, kind in DEVICES.items():
            lines += [f"{row.operation}, {row.what}, {name}: {reason}" for reason in row.choose(kind).reasons]
    return "\n".join(lines)


def main() -> int:
    """Runs the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reasons", action="store_true", help="say why an implementation does not serve")
    given = parser.parse_args()
    print(table())
    if given.reasons:
        print("\n" + reasons())
    return 0


if __name__ == "__main__":
    sys.exit(main())
