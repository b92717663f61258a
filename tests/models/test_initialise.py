"""Random weights follow the recipe, and the key."""

import jax
import numpy as np
import pytest

import models
from tests.tiny import tiny_config


def test_the_recipe():
    model = models.initialise(models.Transformer(tiny_config(width=128, vocab_size=256)), jax.random.key(0))
    layer = model.layers[0]

    def std(parameter):
        return float(np.std(parameter[...]))

    assert std(model.embedding) == pytest.approx(1.0, rel=0.05)
    assert std(model.head) == pytest.approx(0.02, rel=0.05)
    assert std(layer.attention.output.kernel) == pytest.approx(1e-3, rel=0.05)
    assert std(layer.feed_forward.down.kernel) == pytest.approx(1e-3, rel=0.05)
    assert std(layer.attention.query.kernel) == pytest.approx(128**-0.5, rel=0.05)
    assert (np.asarray(layer.attention_norm.scale[...]) == 1).all()


def test_keys_decide():
    blank = models.Transformer(tiny_config())
    one, same, other = (models.randomise(blank, jax.random.key(seed), std=0.1) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.embedding[...], same.embedding[...])
    assert (np.asarray(one.embedding[...]) != np.asarray(other.embedding[...])).any()
    first, second = one.layers[0].feed_forward, one.layers[1].feed_forward
    assert (np.asarray(first.up.kernel[...]) != np.asarray(second.up.kernel[...])).any()
