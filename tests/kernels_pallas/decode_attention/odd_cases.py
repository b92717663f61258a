"""Shapes that few models have, for the TPU compiler: it refuses what interpret mode lets pass."""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import mosaic_tpu
from kernels_pallas.decode_attention.reference import Segment

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

    def part(self, bits, size):
        """Keys or values."""
        if bits >= 16:
            dtype = jnp.bfloat16 if bits == 16 else jnp.float32
            return (Coded(planes=(shape((2, self.heads, self.slots, size), dtype),)),)
        plane = shape((2, self.heads, self.slots * bits // 8, size), jnp.int8)
        return (Coded(planes=(plane,), scale=shape((2, self.heads, self.slots), jnp.float16), bits=bits, shift=0.5),)

    def build(self, mesh):
        """A function to compile, and the shapes of its arguments."""
        heads = self.heads * self.group
        arrays = (
            shape((2, self.tokens, heads, self.size), jnp.bfloat16),
            self.part(self.keys, self.size),
            self.part(self.values or self.keys, self.value_size or self.size),
            shape((2, self.heads if self.own else 1, self.slots), jnp.int32),
            shape((2, self.tokens, heads), jnp.float32) if self.biased else None,
            shape((2, self.tokens), jnp.int32),
        )

        def attend(queries, keys, values, positions, bias, query_positions):
            segment = Segment(
                queries=queries, keys=keys, values=values, positions=positions, bias=bias, num_kv_heads=self.heads
            )
            return mosaic_tpu.walk(segment, query_positions, 1.0, mesh=mesh)

        return attend, arrays


CASES = (
    Case("bf16, heads of 80", 16, size=80),
    Case("bf16, heads of 256 with tokens of their own", 16, size=256, own=True),
    Case("bf16, latent", 16, size=576, value_size=512, heads=1, group=16),
    Case("f32, four tokens and a bias", 32, tokens=4, biased=True),
    Case("bf16, 260 slots", 16, slots=260),
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
    Case("int4, latent", 4, size=576, value_size=512, heads=1, group=16),
)
