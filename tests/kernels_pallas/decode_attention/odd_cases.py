"""Shapes that few models have, for the TPU compiler: it refuses what interpret mode lets pass."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.coded import Coded, plane_bits
from kernels_pallas.decode_attention import mosaic_tpu
from kernels_pallas.decode_attention.reference import Segment, Totals

shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
    """Two sequences over 4,096 slots, if nothing else is said; 16 bits are bfloat16, 32 float32."""

    name: str
    keys: int
    values: int | None = None
    size: int = 128
    value_size: int | None = None
    heads: int = 8
    group: int = 4
    tokens: int = 1
    slots: int = 4096
    own: bool = False
    biased: bool = False
    form: str = ""
    pool: bool = False
    parts: int = 1
    mass: str = ""
    pages: int = 0
    page: int = 16

    def part(self, bits, size):
        """Keys or values."""
        stored = (2, 1 if self.pool else self.heads)
        if bits >= 16:
            dtype = jnp.bfloat16 if bits == 16 else jnp.float32
            return (Coded(planes=(shape((*stored, self.slots, size), dtype),)),)
        planes = tuple(shape((*stored, self.slots * width // 8, size), jnp.int8) for width in plane_bits(bits))
        by_channel = int(self.form.removeprefix("by channel ")) if self.form.startswith("by channel") else 1
        own = (self.slots,) if self.form != "channels" else (4, self.slots)
        own = (self.slots // by_channel, size) if by_channel > 1 else own
        scale = shape((*stored, *own), jnp.float16)
        if self.form == "e4m3fn":
            return (Coded(planes=planes, scale=scale, dtype="float8_e4m3fn"),)
        made = Coded(
            planes=planes,
            scale=scale,
            offset=scale if self.form in ("offsets", "channels") or by_channel > 1 else None,
            bits=bits,
            levels=tuple(float(level) for level in range(1 << bits)) if self.form == "table" else None,
            shift=0.0 if self.form else 0.5,
            token_group=by_channel,
        )
        return (made,) * self.parts

    def build(self, mesh):
        """A function to compile, and the shapes of its arguments."""
        heads, read = self.heads * self.group, self.pages * self.page or self.slots
        arrays = (
            shape((2, self.tokens, heads, self.size * self.parts), jnp.bfloat16),
            self.part(self.keys, self.size),
            self.part(self.values or self.keys, self.value_size or self.size),
            shape((2, self.heads if self.own or self.pages else 1, read), jnp.int32),
            shape((2, self.tokens, heads), jnp.float32) if self.biased else None,
            shape((2, self.tokens), jnp.int32),
            shape((2, self.heads, self.pages), jnp.int32) if self.pages else None,
        )

        def attend(queries, keys, values, positions, bias, query_positions, pages):
            segment = Segment(
                queries=queries,
                keys=keys,
                values=values,
                positions=positions,
                bias=bias,
                owners=positions if self.pool else None,
                num_kv_heads=self.heads,
                pages=pages,
                page=self.page if self.pages else 0,
            )
            if not self.mass:
                return mosaic_tpu.walk(segment, query_positions, 1.0, mesh=mesh)
            ones = jnp.ones((2, heads, self.tokens), jnp.float32)
            totals = Totals(ones, ones, ones)
            return mosaic_tpu.mass(segment, query_positions, 1.0, totals, self.mass, mesh=mesh)

        return attend, arrays


CASES = (
    Case("bf16, heads of 80", 16, size=80),
    Case("bf16, heads of 256 with tokens of their own", 16, size=256, own=True),
    Case("bf16, latent", 16, size=576, value_size=512, heads=1, group=16),
    Case("f32, four tokens and a bias", 32, tokens=4, biased=True),
    Case("bf16, 260 slots", 16, slots=260),
    Case("bf16, heads of 64, 260 slots", 16, size=64, slots=260),
    Case("f32, heads of 64 with tokens of their own", 32, size=64, own=True, slots=1000),
    Case("bf16, heads of 96, a pool", 16, size=96, pool=True),
    Case("bf16, heads of 64, values of 4 bits", 16, 4, size=64),
    Case("int4, heads of 80", 4, size=80),
    Case("int4, four tokens, a bias and tokens of their own", 4, tokens=4, biased=True, own=True),
    Case("int8, two heads with tokens of their own", 8, heads=2, own=True),
    Case("int2, 1,000 slots", 2, slots=1000),
    Case("int4, twelve heads", 4, heads=12, group=1),
    Case("int4, one head", 4, heads=1, group=8),
    Case("int8 and int2, two tokens", 8, 2, tokens=2),
    Case("bf16, four heads of 512", 16, size=512, heads=4),
    Case("f32, heads with tokens of their own in a chunk", 32, heads=32, group=1, tokens=128, own=True),
    Case("int2, one head", 2, heads=1, group=8, slots=131_072),
    Case("int3, heads of 80", 3, size=80),
    Case("int3, a table, heads of 64", 3, size=64, form="table"),
    Case("int4, a table, heads of 80", 4, size=80, form="table"),
    Case("int1, a table, 200 slots", 1, slots=200, form="table"),
    Case("int4, channels, four tokens and a bias", 4, form="channels", tokens=4, biased=True),
    Case("int2, by channel of 8 tokens", 2, form="by channel 8"),
    Case("int4, by channel of 64 tokens, heads of 96", 4, size=96, form="by channel 64"),
    Case("int3, by channel of 32, 288 slots", 3, slots=288, form="by channel 32"),
    Case("e4m3fn, 300 slots, tokens of their own", 8, slots=300, form="e4m3fn", own=True),
    Case("e4m3fn, heads of 80", 8, size=80, form="e4m3fn"),
    Case("int4 with offsets, twelve heads", 4, heads=12, group=1, form="offsets"),
    Case("int4, a pool", 4, pool=True, group=4),
    Case("bf16, a pool", 16, pool=True, group=4, tokens=4),
    Case("two parts of 3 bits", 3, parts=2),
    Case("bf16 and int4", 16, 4),
    Case("int2 and int8", 2, 8, size=256),
    Case("int3, sixteen tokens of eight heads", 3, group=8, tokens=16),
    Case("int4, a table, heads of 192", 4, size=192, form="table"),
    Case("int3, a table, latent", 3, size=576, value_size=512, heads=1, group=16, form="table"),
    Case("int8 and bf16, many heads with tokens of their own", 8, 16, heads=32, group=1, own=True),
    Case("int4 and f32, many heads with tokens of their own", 4, 32, heads=32, group=1, own=True),
    Case("bf16, masses", 16, mass="sum"),
    Case("int4 and 300 slots, largest masses", 4, slots=300, tokens=4, mass="peak"),
    Case("int2 by channel, low masses of a head's own tokens", 2, form="by channel 32", own=True, mass="low"),
    Case("int2 by channel, pages of half a group", 2, form="by channel 32", pages=59),
    Case("f32, wide heads, pages of 24 in several blocks", 32, size=256, slots=4800, page=24, pages=99, tokens=2),
    Case("bf16, pages of 24", 16, slots=4800, page=24, pages=5),
    Case("int3, channels, one head, pages of 32", 3, heads=1, group=8, page=32, pages=40, form="channels"),
    Case("int4, latent", 4, size=576, value_size=512, heads=1, group=16),
)
