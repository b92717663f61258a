"""Segments for the GPU's kernels, and what a compiler makes of these for a GPU that is not there.

python gpu_cases.py KERNEL CASE FOLDER     with XLA_FLAGS=--xla_dump_to=FOLDER
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.coded import Coded, pack
from kernels_pallas.decode_attention import Segment, reference, triton_gpu, triton_mass
from tests.cuda import compile_kernel, resources

CHIP = "NVIDIA H200"
FLOATS = ("float32", "bfloat16", "float16")

packed = jax.jit(pack, static_argnums=1)


def part_of(generator, kind, shape, *, empty):
    """Numbers of a kind, and NaN wherever empty slots can hold it.

    Kinds: names of floats; int4, evenly spaced; table4, a table of levels; group4, scales and offsets of 32 channels of
    a token; channel4, those of a channel of 32 tokens; token4, a scale and an offset of a token.
    """
    if kind.startswith(("float", "bfloat")):
        numbers = jnp.asarray(np.where(empty[..., None], np.nan, generator.normal(size=shape)), jnp.float32)
        if kind in FLOATS:
            return Coded(planes=(numbers.astype(kind),))
        return Coded(planes=(numbers.astype(kind).view(jnp.int8),), dtype=kind)
    name, bits = kind[:-1], int(kind[-1])
    batch, heads, slots, size = shape
    half = 1 << (bits - 1)
    planes = packed(jnp.asarray(generator.integers(-half, half, shape), jnp.int32), bits)
    sizes = {"group": (batch, heads, size // 32, slots), "channel": (batch, heads, slots // 32, size)}
    sizes = sizes.get(name, shape[:3])

    def scales(low, high):
        numbers = generator.uniform(low, high, sizes) / half
        if name == "channel":  # groups of which no slot is used
            numbers = np.where(empty.reshape(batch, heads, -1, 32).all(axis=3)[..., None], np.nan, numbers)
        else:
            numbers = np.where(empty[:, :, None] if name == "group" else empty, np.nan, numbers)
        return jnp.asarray(numbers, jnp.float16)

    scale = scales(0.5, 1.5)
    if name == "int":
        return Coded(planes=planes, bits=bits, scale=scale, shift=0.5)
    if name == "table":
        levels = np.sort(generator.normal(size=half)) ** 2 * half
        return Coded(planes=planes, bits=bits, scale=scale, levels=(*map(float, -levels[::-1]), *map(float, levels)))
    group = 32 if name == "channel" else 1
    return Coded(planes=planes, bits=bits, scale=scale, offset=scales(-2, 1), shift=float(half), token_group=group)


def made(keys, values=None, *, batch=2, stored=2, group=4, tokens=1, slots=192, size=64, width=None, heads=1):
    """A segment with a tenth of its slots and a few at its end empty, and queries as a model gives them."""
    generator = np.random.default_rng(0)
    positions = np.tile(np.arange(slots, dtype=np.int32), (batch, heads, 1))
    positions[generator.random(positions.shape) < 0.1] = -1
    positions[:, :, -40:] = -1
    empty = np.broadcast_to((positions < 0).all(axis=1, keepdims=True), (batch, stored, slots))
    dtype = jnp.float32 if keys == "float32" else jnp.bfloat16
    segment = Segment(
        queries=jnp.asarray(generator.normal(size=(batch, tokens, stored * group, size)), dtype),
        keys=(part_of(generator, keys, (batch, stored, slots, size), empty=empty),),
        values=(part_of(generator, values or keys, (batch, stored, slots, width or size), empty=empty),),
        positions=jnp.asarray(positions),
        num_kv_heads=stored,
    )
    query_positions = slots - 50 - tokens + np.tile(np.arange(tokens, dtype=np.int32), (batch, 1))
    return segment, jnp.asarray(query_positions)


def in_parts(keys, values, **changes):
    """A segment whose numbers follow each other in parts of these kinds and sizes."""
    whole, query_positions = made("bfloat16", **changes)
    generator, empty = np.random.default_rng(7), np.asarray(whole.positions < 0)
    shape = whole.keys[0].planes[0].shape[:3]
    empty = np.broadcast_to(empty, shape)

    def parts(kinds):
        return tuple(part_of(generator, kind, (*shape, size), empty=empty) for kind, size in kinds)

    return dataclasses.replace(whole, keys=parts(keys), values=parts(values)), query_positions


def attend(
    queries, keys, values, positions, query_positions, bias=None, pages=None, *, walk=triton_gpu.walk, **options
):
    keys, values = (parts if isinstance(parts, tuple) else (parts,) for parts in (keys, values))
    segment = Segment(queries=queries, keys=keys, values=values, positions=positions, bias=bias, pages=pages)
    if pages is not None:
        segment = dataclasses.replace(segment, page=positions.shape[2] // pages.shape[2])
    segment = dataclasses.replace(segment, num_kv_heads=max(keys[0].num_heads, positions.shape[1]))
    return walk(segment, query_positions, queries.shape[3] ** -0.5, **options)


def weigh(queries, keys, values, positions, query_positions, maximum, *, mass="sum"):
    """Masses, given something for the totals."""
    segment = Segment(queries=queries, keys=(keys,), values=(values,), positions=positions, num_kv_heads=8)
    totals = reference.Totals(maximum, maximum, maximum)
    return triton_mass.mass(segment, query_positions, queries.shape[3] ** -0.5, totals, mass)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes to compile: B = 8, K = 8, S = 16,384.

    Attributes:
      keys: kind, see `part_of`.
      values: kind.
      group: G.
      tokens: T.
      size: D.
      pages: of 16 slots that each head reads; 0 for all.
    """

    keys: str
    values: str
    group: int = 8
    tokens: int = 1
    size: int = 128
    pages: int = 0

    def build(self):
        """The arguments of `attend` and `weigh`, as shapes."""
        small = (1, 1, 64, self.size)
        generator, empty = np.random.default_rng(0), np.zeros(small[:3], bool)

        def grow(part):
            axis = 2 if part.token_group > 1 else -1

            def shape(array, axis):
                sizes = [8, 8, *array.shape[2:]]
                sizes[axis] *= 16_384 // 64
                return jax.ShapeDtypeStruct(tuple(sizes), array.dtype)

            planes = tuple(shape(plane, 2) for plane in part.planes)
            scales = {
                name: None if getattr(part, name) is None else shape(getattr(part, name), axis)
                for name in ("scale", "offset")
            }
            return dataclasses.replace(part, planes=planes, **scales)

        keys, values = (grow(part_of(generator, kind, small, empty=empty)) for kind in (self.keys, self.values))
        queries = jax.ShapeDtypeStruct((8, self.tokens, 8 * self.group, self.size), jnp.bfloat16)
        read = (8, 8, 16 * self.pages) if self.pages else (8, 1, 16_384)
        positions, query_positions, pages = (
            jax.ShapeDtypeStruct(size, jnp.int32) for size in (read, (8, self.tokens), (8, 8, self.pages))
        )
        given = queries, keys, values, positions, query_positions
        return (*given, None, pages) if self.pages else given


CASES = {
    "bf16": Case("bfloat16", "bfloat16"),
    "f32": Case("float32", "float32"),
    "fp8": Case("float8_e4m3fn", "float8_e4m3fn"),
    "int8": Case("int8", "int8"),
    "int4": Case("int4", "int4"),
    "int3": Case("int3", "int3"),
    "int2": Case("int2", "int2"),
    "lloyd4": Case("table4", "table4"),
    "lloyd3": Case("table3", "table3"),
    "kivi2": Case("channel2", "group2"),
    "int4.t16": Case("int4", "int4", tokens=16),
    "bf16.pages": Case("bfloat16", "bfloat16", pages=64),
    "int4.pages": Case("int4", "int4", pages=64),
    "kivi2.pages": Case("channel2", "group2", pages=64),
    "bf16.d256": Case("bfloat16", "bfloat16", size=256),
    "fp8.d80": Case("float8_e4m3fn", "float8_e4m3fn", size=80),
    "f32.d256.t16": Case("float32", "float32", size=256, tokens=16),
    "bf16.d576": Case("bfloat16", "bfloat16", group=16, size=576),
    "f32.d576.t16": Case("float32", "float32", group=16, size=576, tokens=16),
}


KERNELS = {"decode_attention": attend, "merge_attention": attend, "attention_mass": weigh}
"""Name on the device -> a function that runs it."""


def compile_case(kernel, name, folder):
    """Compiles a case for an H200; in a process of its own, see `resources_of`."""
    arguments = CASES[name].build()
    if kernel == "attention_mass":
        batch, tokens, heads, _ = arguments[0].shape
        arguments = (*arguments, jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32))
    compile_kernel(KERNELS[kernel], arguments, name=kernel, folder=folder)


def resources_of(kernel, name, folder, record_property):
    """Registers and spilled bytes of a kernel."""
    return resources([__file__, kernel, name], folder, record_property)


if __name__ == "__main__":
    compile_case(*sys.argv[1:])
