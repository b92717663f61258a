"""Codes, slots to put them into, and a kernel beside the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.coded import Coded, pack
from kernels_pallas.slots import reference


def coded(bits, slots, *, heads=2, size=16, seed=0):
    generator, half = np.random.default_rng(seed), 1 << (bits - 1)
    codes = jnp.asarray(generator.integers(-half, half, (2, heads, slots, size)))
    scale = jnp.asarray(generator.normal(size=(2, heads, slots)), jnp.float16)
    return Coded(planes=pack(codes, bits), bits=bits, scale=scale)


def drawn(slots, count, *, heads=2, seed=1):
    """Distinct slots for each head, of which one goes nowhere."""
    generator = np.random.default_rng(seed)
    found = np.stack([generator.permutation(slots)[:count] for _ in range(2 * heads)]).reshape(2, heads, count)
    found[0, 0, count // 2] = -1
    return jnp.asarray(found, jnp.int32)


@functools.partial(jax.jit, static_argnames=("put_fields", "interpret"))
def by_kernel(parts, new, slots, *, put_fields, interpret):
    put_fields = functools.partial(put_fields, interpret=interpret)
    return reference.put_slots(parts, new, slots, unit=1, put_fields=put_fields)


by_reference = jax.jit(functools.partial(reference.put_slots, unit=1))


def assert_same(kernel, parts, new, slots, *, interpret=True):
    """Arrays that a kernel left beside the reference's, which are the same."""
    ours = by_kernel(parts, new, slots, put_fields=kernel.put_fields, interpret=interpret)
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(by_reference(parts, new, slots)), strict=True))
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    return pairs
