"""Model configs: counts of parameters and the facts that a cache needs (parsing: test_hf_config.py)."""

import jax

import models
from models.config import ModelConfig
from tests.tiny import tiny_config


def test_counted_parameters_are_those_of_the_model(golden):
    for folder in sorted((golden / "transformers").iterdir()):
        config = models.read_config(folder / "config.json")
        leaves = jax.tree.leaves(models.abstract_model(config))
        assert sum(leaf.size for leaf in leaves) == config.num_parameters(), folder.name


def test_configs_are_static_and_give_the_cache_its_facts():
    config: ModelConfig = tiny_config()
    assert hash(config) == hash(tiny_config())
    shape = config.cache_shape("bfloat16")
    assert (shape.num_layers, shape.num_query_heads, shape.num_kv_heads, shape.head_size) == (2, 4, 2, 16)
    assert shape.dtype == "bfloat16"
