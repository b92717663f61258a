"""Random rotations, which make all coordinates of a vector alike: signed Hadamard matrices and dense ones."""

import functools

import numpy as np
from scipy import linalg


@functools.lru_cache(maxsize=32)
def hadamard_rotation(size: int, seed: int) -> np.ndarray:
    """H diag(s) / sqrt(size) with random signs s, orthogonal `size size` float32, to be multiplied from the left.

    Signs are drawn, not computed from the bits of an index: signs that are linear in these bits only permute what
    comes out. Without signs a constant offset of all coordinates would land in one of them.

    Args:
      size: a power of two.
      seed: of the signs.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=size)
    return (linalg.hadamard(size) * signs[None, :] / np.sqrt(size)).astype(np.float32)


@functools.lru_cache(maxsize=32)
def dense_rotation(size: int, seed: int) -> np.ndarray:
    """A rotation drawn evenly from all (the Q of a Gaussian matrix, columns signed by R's diagonal), float32."""
    orthogonal, upper = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return (orthogonal * np.sign(np.diag(upper))[None, :]).astype(np.float32)


def is_power_of_two(size: int) -> bool:
    """Whether a Hadamard matrix of this size can be doubled up from 1."""
    return size > 0 and size & (size - 1) == 0
