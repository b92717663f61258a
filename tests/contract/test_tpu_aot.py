"""Compiles the decode step with coded bodies for TPU chips that are not there, and reads what its buffers take."""

import json

import pytest

from tests.libtpu import needs_libtpu, run

# Two layers of Qwen3-8B on one chip: layers are alike, and the whole model takes minutes to compile.
COMPILE = """
import dataclasses, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import models
from kvjax.empty import abstract_cache
from kvjax.decoding import compressed_decode
from kvjax.grammar import parse_policy

topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
mesh = Mesh(np.array(topology.devices[:1]).reshape(1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
config = dataclasses.replace(models.published_config("qwen3-8b"), num_layers=2)
model = models.abstract_model(config, mesh=mesh)
tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=model.placement.sharding("B T", (1, 1)))
for text in sys.argv[2:]:
    policy = parse_policy(text)
    cache = abstract_cache(
        model.cache_shape, policy=policy, batch=1, max_tokens=32_768, placement=model.placement
    )
    numbers = 8 * 128
    layer = cache.layers[0]
    bits = [codec.bits_per_element(fitted) for codec, fitted in zip(layer.body.codecs, layer.body.fitted)]
    stated = layer.body.num_slots * numbers * sum(bits) / 8 + layer.exact.num_slots * numbers * 2 * 2
    memory = compressed_decode.lower(model, cache, tokens).compile().memory_analysis()
    print("RESULT", json.dumps({
        "policy": text,
        "bits": sum(bits) / 2,
        "cache": memory.alias_size_in_bytes,
        "stated": 2 * stated,
        "temporary": memory.temp_size_in_bytes,
    }))
"""


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "policies"),
    [
        ("v5e:2x2", ["int8", "turboquant(bits=4)", "kivi(bits=2)"]),
        ("v6e:2x2", ["int4", "turboquant(bits=2)", "kivi(bits=4)"]),
    ],
)
def test_coded_bodies_take_their_stated_bits_on_tpus(topology, policies, record_property):
    """At 32,768 tokens: cache at most 1.03 times what codecs state, temporaries at most one layer in float32."""
    done = run(COMPILE, topology, *policies)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(policies), done.stderr[-3000:]
    for memory in map(json.loads, lines):
        ratio = memory["cache"] / memory["stated"]
        record_property(
            "print",
            f"{topology} {memory['policy']}: {memory['bits']:.3f} bits, cache {memory['cache']:,} bytes "
            f"({ratio:.4f} of stated), temporary {memory['temporary']:,}",
        )
        assert 1.0 <= ratio <= 1.03
        assert memory["temporary"] <= 2 * 8 * 32_768 * 128 * 4
