"""Codecs that are fitted without a model, and vectors that go through them."""

import jax
import jax.numpy as jnp
import numpy as np

from kvjax._kernels import read_parts
from kvjax.codec import CODECS
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope, rotate, turns_at
from kvjax.stages.facts import LayerFacts
from kvjax.statistics import empty_statistics, observe

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options for functions that run a few times on little."""


def shape_of(*, head_size=128, kv_heads=2, query_heads=4, dtype="float32", theta=10_000.0):
    """A model of one layer."""
    return ModelShape(
        num_layers=1,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype=dtype,
        vocab_size=64,
        rope=Rope(head_size=head_size, theta=theta),
    )


def normal(*shape, seed=0):
    """Normal numbers, float32; not those that rotations and sketches of the same seed are drawn from."""
    return np.random.default_rng([seed, 2024]).normal(size=shape).astype(np.float32)


def all_positions(vectors):
    """`B S`: 0, 1, 2, ..."""
    return jnp.broadcast_to(jnp.arange(vectors.shape[2], dtype=jnp.int32), (vectors.shape[0], vectors.shape[2]))


def turned(shape, keys):
    """Keys `B K S D` after RoPE at positions 0, 1, 2, ..."""
    keys = jnp.asarray(keys)
    return jnp.swapaxes(rotate(jnp.swapaxes(keys, 1, 2), turns_at(shape.rope, all_positions(keys))), 1, 2)


def statistics_of(shape, keys, values=None, queries=None, *, heads=1):
    """Statistics of the only layer, numpy arrays, of keys and values `B K S D` and queries `B N S D`.

    Keys and queries are rotated ones; values and queries that are not given are normal.
    """
    values = normal(*keys.shape, seed=11) if values is None else values
    queries = normal(keys.shape[0], shape.num_query_heads, *keys.shape[2:], seed=12) if queries is None else queries
    tokens_first = [jnp.swapaxes(jnp.asarray(array), 1, 2) for array in (queries, keys, values)]
    layer = empty_statistics(shape, heads=heads)[0]
    queries, keys, values = tokens_first
    positions = all_positions(jnp.swapaxes(keys, 1, 2))
    return jax.tree.map(
        np.asarray,
        jax.jit(observe, compiler_options=QUICK)(layer, queries, keys=keys, values=values, positions=positions),
    )


def fitted(name, role="keys", *, shape=None, statistics=None, **arguments):
    """A codec for layer 0 of a model, and its fitted arrays."""
    facts = LayerFacts(shape=shape or shape_of(), layer=0, role=role, statistics=statistics)
    return CODECS.get(name)(role, **arguments).fit(facts)


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _store(codec, vectors, positions, queries, arrays):
    chosen = codec.choose(vectors, positions=positions, queries=queries, arrays=arrays)
    arrays = {**arrays, **chosen}
    parts = codec.encode(vectors, positions=positions, arrays=arrays)
    return parts, codec.decode(parts, positions=positions[:, None], arrays=arrays), arrays


def stored(codec, arrays, vectors, *, positions=None, queries=None):
    """The parts that a fitted codec makes of a row's first vectors, what they decode to, and all arrays."""
    vectors = jnp.asarray(vectors)
    positions = all_positions(vectors) if positions is None else positions
    return _store(codec, vectors, positions, queries, arrays)


def relative_error(exact, decoded):
    """Mean over vectors of |x - x^|^2 / |x|^2."""
    exact, decoded = np.asarray(exact, np.float64), np.asarray(decoded, np.float64)
    return float(np.mean(np.sum((exact - decoded) ** 2, axis=-1) / np.sum(exact**2, axis=-1)))


def error_of(name, vectors, role="keys", *, shape=None, statistics=None, **arguments):
    """Relative error of vectors `B K S D` through a codec."""
    codec, arrays = fitted(name, role, shape=shape, statistics=statistics, **arguments)
    return relative_error(vectors, stored(codec, arrays, vectors)[1])


def bytes_a_token(name, role="keys", *, shape=None, statistics=None, **arguments):
    """Bytes that a codec stores for one token of one key/value head."""
    shape = shape or shape_of(dtype="bfloat16")
    codec, arrays = fitted(name, role, shape=shape, statistics=statistics, **arguments)
    return codec.bits_per_element(arrays) * shape.head_size / 8


@jax.jit(static_argnums=0, compiler_options=QUICK)
def _through(quantiser, numbers):
    return quantiser.collapse(read_parts(quantiser.encode(numbers)))


@jax.jit(static_argnums=0, compiler_options=QUICK)
def encoded(quantiser, numbers):
    """The parts that a quantiser makes of numbers `B K S R`, and what they read as."""
    parts = quantiser.encode(numbers)
    return parts, read_parts(parts)


def through(quantiser, vectors):
    """What a quantiser makes of vectors `S R`."""
    return np.asarray(_through(quantiser, jnp.asarray(vectors, jnp.float32)[None, None]))[0, 0]


def unit_vectors(count, size, seed=0):
    """Vectors of length 1 in random directions, `count size`."""
    vectors = normal(count, size, seed=seed)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def product_errors(quantiser, *, size=128):
    """Errors of 100,000 inner products of unit vectors, x kept by a quantiser.

    Returns `(across, along)`: <x^ - x, z> for unit z orthogonal to x, 4000 by 25, and <x^ - x, x>. The product with a
    unit vector at cosine c to x is wrong by c along + sqrt(1 - c^2) across.
    """
    vectors, others = unit_vectors(4000, size), unit_vectors(25, size, seed=1)
    rest = through(quantiser, vectors) - vectors
    along, cosines = np.sum(rest * vectors, axis=1), vectors @ others.T
    return (rest @ others.T - cosines * along[:, None]) / np.sqrt(1 - cosines**2), along
