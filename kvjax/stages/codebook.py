"""Levels of scalar quantisers: Lloyd-Max for the normal and for a coordinate on the sphere, uniform, NormalFloat.

All are for numbers of variance 1. A unit vector's coordinate after a random rotation, times sqrt(d), has

    density  f(t) ~ (1 - t**2)**((d - 3) / 2)   on [-1, 1], t the coordinate     (TurboQuant, arXiv 2504.19874)

which tends to the normal as d grows. Lloyd-Max levels minimise the mean squared error: each threshold lies in the
middle of its neighbours, each level is the mean of its cell.
"""

import functools
import math

import numpy as np
from scipy import special

_TOLERANCE = 1e-13
_MOST_STEPS = 100_000


@functools.lru_cache(maxsize=64)
def lloyd_max(bits: int, size: int | None = None) -> tuple[float, ...]:
    """The 2**bits levels that minimise the mean squared error.

    Args:
      bits: 1 to 8.
      size: d, of the vector whose coordinates are quantised; None for the normal, its limit.

    Returns:
      Levels in ascending order, symmetric.
    """
    count = 1 << bits
    levels = special.ndtri((np.arange(count) + 0.5) / count)
    for _ in range(_MOST_STEPS):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        moved = np.diff(_first_moment(edges, size)) / np.diff(_cumulative(edges, size))
        moved = (moved - moved[::-1]) / 2
        change, levels = np.max(np.abs(moved - levels)), moved
        if change < _TOLERANCE:
            break
    return tuple(levels.tolist())


def distortion(levels: tuple[float, ...], size: int | None = None) -> float:
    """Mean squared error per number of variance 1 when each is replaced by its nearest level."""
    points = np.asarray(levels)
    edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
    mass, first = np.diff(_cumulative(edges, size)), np.diff(_first_moment(edges, size))
    return float(1.0 - 2.0 * np.sum(first * points) + np.sum(mass * points**2))


@functools.lru_cache(maxsize=16)
def uniform_step(bits: int) -> float:
    """The step of the mid-rise uniform quantiser, levels (i + 1/2) step, that is best for the normal.

    Golden-section search on the exact distortion: 0.99569 at 2 bits, 0.33520 at 4.
    """
    half = 1 << (bits - 1)
    centres = np.arange(-half, half) + 0.5
    low, high = 1e-3, 4.0
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-10:
        one, other = high - ratio * (high - low), low + ratio * (high - low)
        if distortion(tuple(centres * one)) < distortion(tuple(centres * other)):
            high = other
        else:
            low = one
    return (low + high) / 2


@functools.lru_cache(maxsize=8)
def normal_float(bits: int) -> tuple[float, ...]:
    """NormalFloat levels in [-1, 1] (QLoRA, arXiv 2305.14314, appendix E): quantiles of the normal, 0 among them."""
    half, tail = 1 << (bits - 1), 0.9677083
    upper = special.ndtri(np.linspace(tail, 0.5, half + 1)[:-1])
    lower = -special.ndtri(np.linspace(tail, 0.5, half)[:-1])
    levels = np.sort(np.concatenate([upper, [0.0], lower]))
    return tuple((levels / np.max(levels)).tolist())


def _cumulative(points: np.ndarray, size: int | None) -> np.ndarray:
    """P(x < point) for x of variance 1."""
    if size is None:
        return special.ndtr(points)
    coordinate = np.clip(points / math.sqrt(size), -1.0, 1.0)
    return 0.5 + 0.5 * np.sign(coordinate) * special.betainc(0.5, (size - 1) / 2, coordinate**2)


def _first_moment(points: np.ndarray, size: int | None) -> np.ndarray:
    """The integral of x f(x) from minus infinity to each point."""
    if size is None:
        return -np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    coordinate = np.clip(points / math.sqrt(size), -1.0, 1.0)
    constant = math.exp(math.lgamma(size / 2) - math.lgamma((size - 1) / 2)) / math.sqrt(math.pi)
    return -math.sqrt(size) * constant / (size - 1) * (1 - coordinate**2) ** ((size - 1) / 2)
