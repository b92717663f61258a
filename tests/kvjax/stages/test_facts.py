"""Facts of a layer: which moments belong to the vectors that come in, and what to do when there are none."""

import numpy as np
import pytest

from kvjax.errors import UserError
from kvjax.stages.facts import LayerFacts
from tests.fitted import normal, shape_of, statistics_of, turned

SHAPE = shape_of(head_size=8)


def facts(statistics, **fields):
    return LayerFacts(shape=SHAPE, layer=0, statistics=statistics, **fields)


def test_the_moments_are_those_of_the_role_and_of_the_stage():
    keys, values = normal(1, 2, 64, 8) + 1, normal(1, 2, 64, 8, seed=1) - 2
    rotated = np.asarray(turned(SHAPE, keys))
    statistics = statistics_of(SHAPE, rotated, values)
    for role, before, vectors in (
        ("keys", False, rotated),
        ("keys", True, keys),
        ("values", False, values),
        ("values", True, values),
    ):
        moments = facts(statistics, role=role, before_rope=before).moments
        np.testing.assert_allclose(moments.mean, vectors[0].mean(axis=1), rtol=0, atol=1e-5)
        second = np.einsum("ksd,kse->kde", vectors[0], vectors[0]) / 64
        np.testing.assert_allclose(moments.second, second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("role", ["keys", "values"])
def test_without_statistics_the_way_out_is_named(role):
    with pytest.raises(UserError, match=rf"needs statistics of the model's {role}: .*python -m kvjax\.calibrate"):
        _ = facts(None, role=role).moments
