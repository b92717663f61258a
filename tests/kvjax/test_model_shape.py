"""The facts of a model that caches know it by."""

import dataclasses

from tests.tiny import tiny_config


def test_models_differ_by_their_fingerprint_where_all_sizes_agree():
    """A rotation, a norm or a feed-forward width that differs makes another model; the dtype does not."""
    config = tiny_config()
    shape = config.cache_shape("float32")
    assert hash(shape) == hash(config.cache_shape("float32"))
    assert shape.rope == config.rope
    assert shape.fingerprint == config.cache_shape("bfloat16").fingerprint
    for change in ({"feed_forward": 65}, {"norm_epsilon": 1e-5}, {"qkv_bias": True}):
        other = dataclasses.replace(config, **change).cache_shape("float32")
        assert other.fingerprint != shape.fingerprint
        assert dataclasses.replace(other, fingerprint=shape.fingerprint) == shape
