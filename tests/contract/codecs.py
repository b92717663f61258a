"""Every codec with arguments that suit the tiny model, and that model's statistics."""

import functools

import numpy as np

from kvjax.calibrate import calibrate
from tests.tiny import tiny_model

EXACT = "+exact(sinks=2,window=8,round=16)"

CODECS = (
    "none(mean=prompt)",
    "int8(mean=prompt,rope=pre)",
    "fp8(scale=token)",
    "int4",
    "int2(range=minmax)",
    "kivi(bits=2,group=16)",
    "turboquant(bits=2.5)",
    "turboquant(bits=2,prod=gaussian)",
    "lowrank(energy=0.8,bits=4,rope=pre)",
    "lowrank(rank=16,heads=2,bits=8)",
    "think",
    "oscar",
    "nf",
    "key(int8)+value(turboquant,bits=3)",
)
"""Policies without their exact segment."""


@functools.cache
def model():
    """Two layers."""
    return tiny_model()


@functools.cache
def statistics():
    """Of the model, from random tokens."""
    generator = np.random.default_rng(1)
    rows = (generator.integers(0, 64, 64).astype(np.int32) for _ in range(4))
    return calibrate(model(), rows, batch=2, row_tokens=64, heads=2)


def random_tokens(*shape, seed=0):
    """Token ids of the model's vocabulary."""
    return np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)
