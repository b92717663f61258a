"""Rows to select from, and a kernel beside the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.select import reference


def drawn(shape, *, seed=0, values=None):
    """Scores (of few values if asked for), protected slots, distinct ages with a tenth of the slots empty, budgets."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=shape)
    if values:
        scores = np.round(scores * values) / values
    recency = np.argsort(generator.random(shape), axis=-1)
    recency[generator.random(shape) < 0.1] = -1
    protected = generator.random(shape) < 0.1
    budgets = generator.integers(0, shape[-1] + 2, shape[:-1])
    return scores.astype(np.float32), protected, recency.astype(np.int32), budgets.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("thresholds", "how"))
def kept(scores, protected, recency, budgets, *, thresholds=reference.thresholds, how=()):
    """What is kept by a search and its arguments, pairs that hash."""
    search = functools.partial(thresholds, **dict(how))
    return reference.select(scores, protected=protected, recency=recency, budgets=budgets, search=search)


def assert_same(thresholds, arrays, *, interpret=True):
    """What a kernel keeps, which is what the reference keeps."""
    arrays = tuple(map(jnp.asarray, arrays))
    ours = np.asarray(kept(*arrays, thresholds=thresholds, how=(("interpret", interpret),)))
    np.testing.assert_array_equal(ours, np.asarray(kept(*arrays)))
    return ours
