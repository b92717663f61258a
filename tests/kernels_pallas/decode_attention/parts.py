"""Segments of parts of every layout, a tenth of their slots empty and NaN wherever those can hold it."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from kernels_pallas.coded import Coded, pack
from kernels_pallas.decode_attention import Segment

LEVELS = tuple(float(np.sign(x) * abs(x) ** 1.3) for x in np.linspace(-1.4, 1.5, 16))
FORMS = {
    "tokens": {},
    "offsets": {"offset": True},
    "channels": {"groups": 4, "offset": True},
    "by channel": {"token_group": 32, "offset": True},
    "by channel, no offsets": {"token_group": 64},
}
"""How scales and offsets lie."""


def coded(generator, bits, shape, *, empty, groups=1, token_group=1, offset=False, shift=0.5, levels=None):
    """Codes of so many bits, with what `FORMS` says."""
    batch, heads, slots, size = shape
    half = 1 << (bits - 1)
    planes = pack(jnp.asarray(generator.integers(-half, half, shape)), bits)
    if token_group > 1:
        own, gone = (batch, heads, slots // token_group, size), None
    else:
        own = (batch, heads, slots) if groups == 1 else (batch, heads, groups, slots)
        gone = empty if groups == 1 else empty[:, :, None]

    def field(low, high):
        numbers = generator.uniform(low, high, own)
        return jnp.asarray(numbers if gone is None else np.where(gone, np.nan, numbers), jnp.float16)

    scale = field(0.5 / half, 1.5 / half)
    return Coded(
        planes=planes,
        bits=bits,
        scale=scale,
        offset=field(-0.5, 0.5) if offset else None,
        shift=0.0 if levels else shift,
        token_group=token_group,
        levels=levels,
    )


def floats(generator, dtype, shape, *, empty):
    """Floats as they are, or of 8 bits with a scale a token."""
    numbers = generator.normal(size=shape)
    if not dtype.startswith("float8"):
        return Coded(planes=(jnp.asarray(np.where(empty[..., None], np.nan, numbers), dtype),))
    bytes_ = np.array(jnp.asarray(numbers * 4, dtype).view(jnp.int8))
    bytes_[empty] = 0x7F  # NaN
    scale = np.where(empty, np.nan, generator.uniform(0.1, 0.4, shape[:3]))
    return Coded(planes=(jnp.asarray(bytes_),), scale=jnp.asarray(scale, jnp.float16), dtype=dtype)


def of_bits(bits, **form):
    """What makes codes, for `made`."""
    return lambda generator, shape, empty: coded(generator, bits, shape, empty=empty, **form)


def of_floats(dtype):
    """What makes floats, for `made`."""
    return lambda generator, shape, empty: floats(generator, dtype, shape, empty=empty)


def made(make_keys, make_values, *, batch=1, stored=2, group=4, tokens=1, slots=768, size=64, own=False, seed=0):
    """A segment, and queries at its newest positions.

    What makes keys and values is a function of a generator, a shape and the empty slots, and gives one part or a tuple.
    """
    generator = np.random.default_rng(seed)
    positions = np.tile(np.arange(slots, dtype=np.int32), (batch, stored if own else 1, 1))
    positions[generator.random(positions.shape) < 0.1] = -1
    empty = np.broadcast_to((positions < 0).all(axis=1, keepdims=True), (batch, stored, slots))
    keys, values = (make(generator, (batch, stored, slots, size), empty=empty) for make in (make_keys, make_values))
    keys, values = (parts if isinstance(parts, tuple) else (parts,) for parts in (keys, values))
    width = sum(part.planes[0].shape[3] for part in keys)
    queries = generator.normal(size=(batch, tokens, stored * group, width))
    segment = Segment(
        queries=jnp.asarray(queries, jnp.float32),
        keys=keys,
        values=values,
        positions=jnp.asarray(positions),
        num_kv_heads=stored,
    )
    return segment, jnp.asarray(slots - tokens + np.tile(np.arange(tokens, dtype=np.int32), (batch, 1)))


def paged(segment, page, count, *, missing=1, seed=0):
    """Some pages of a segment, each head's own and in any order, and the whole segment with all other slots empty.

    The last `missing` entries of a list name no page. What lies in pages that are not read is NaN wherever it can be.
    """
    generator = np.random.default_rng(seed)
    batch, heads = segment.queries.shape[0], segment.keys[0].num_heads
    whole = np.broadcast_to(np.asarray(segment.positions), (batch, heads, segment.positions.shape[2]))
    total = whole.shape[2] // page
    pages = [generator.permutation(total)[:count] for _ in range(batch * heads)]
    pages = np.stack(pages).reshape(batch, heads, count).astype(np.int32)
    pages[:, :, count - missing :] = -1
    slots = (pages[..., None] * page + np.arange(page)).reshape(batch, heads, -1)
    of_pages = np.where(slots >= 0, np.take_along_axis(whole, np.maximum(slots, 0), axis=2), -1)
    read = (pages[..., None] == np.arange(total)).any(axis=2).repeat(page, axis=2)
    keys, values = (tuple(spoiled(part, read) for part in parts) for parts in (segment.keys, segment.values))
    others_empty = dataclasses.replace(segment, positions=jnp.asarray(np.where(read, whole, -1)))
    own = {"positions": jnp.asarray(of_pages), "pages": jnp.asarray(pages), "page": page}
    return dataclasses.replace(segment, keys=keys, values=values, **own), others_empty


def spoiled(part, read):
    """A part with NaN, where it has floats, in all slots but those that are read (`B k S`)."""

    def spoil(array, *, axis, entries):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        tokens = entries[1] // entries[0]
        kept = read.reshape(*read.shape[:2], -1, tokens).any(axis=3)
        kept = kept.reshape(*kept.shape[:2], *(1,) * (axis - 2), kept.shape[2], *(1,) * (array.ndim - axis - 1))
        return jnp.where(kept, array, jnp.asarray(np.nan, array.dtype))

    return part.map_tokens(spoil)
