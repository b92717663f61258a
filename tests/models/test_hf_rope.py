"""RoPE in config.json: both versions, and each wrong value named (values against transformers: test_transformer.py)."""

import pytest

from kvjax.errors import UserError
from kvjax.rope import Rope, YarnScaling
from models.hf_rope import parse_rope


def parse(**fields):
    return parse_rope(fields, head_size=64, max_positions=4096, source="config.json")


def test_plain_rope():
    assert parse() == parse(rope_scaling=None) == parse(rope_parameters={"rope_type": "default"}) == Rope(head_size=64)
    assert parse(rope_theta=500).theta == parse(rope_parameters={"rope_theta": 500.0}).theta == 500.0


def test_the_same_parameters_may_stand_twice():
    twice = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10.0}
    assert parse(rope_parameters=twice, rope_scaling=twice) == parse(rope_scaling=twice)


def test_a_yarn_factor_follows_from_the_context_lengths():
    scaling = parse(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 1024}).scaling
    assert scaling == YarnScaling(factor=4.0, original_max_positions=1024)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_parameters": {"rope_theta": 1.0}, "rope_scaling": {"type": "yarn"}}, "differ; keep the one"),
        ({"rope_theta": "abc"}, "'rope_theta' is 'abc'; a positive number was expected"),
        ({"rope_theta": -1}, "'rope_theta' is -1; a positive number"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; an object was expected"),
        ({"rope_scaling": {"type": [1]}}, "Unknown rope_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "'factor' is 0; a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": "x"}}, "'factor' is 'x'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": "x"}}, "'beta_fast' is 'x'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": 1}}, "'truncate' is 1; true or false"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "per layer type are not supported"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 2, "high_freq_factor": 2}},
            "low_freq_factor must be below high_freq_factor",
        ),
    ],
)
def test_wrong_values_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        parse(**fields)
