"""What a walk over a segment gives, in terms that do not depend on the implementation."""

import numpy as np


def finished(running):
    """Output, and log of the sum of weights; 0 and -inf where nothing is seen."""
    output, maximum, total = (np.asarray(array, np.float64) for array in running)
    seen = total > 0
    total = np.where(seen, total, 1.0)
    return np.where(seen[..., None], output / total[..., None], 0.0), np.where(seen, maximum + np.log(total), -np.inf)


def assert_equal(ours, theirs, tolerance):
    """The same, within a tolerance of the largest number."""
    for one, other in zip(ours, theirs, strict=True):
        finite = np.isfinite(other)
        np.testing.assert_array_equal(np.isfinite(one), finite)
        atol = tolerance * max(np.abs(other[finite]).max(initial=0.0), 1e-6)
        np.testing.assert_allclose(one[finite], other[finite], rtol=0, atol=atol)
