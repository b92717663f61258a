"""Compiles Qwen3-8B's decode step for a slice of eight TPU chips that is not there, and prints bytes per chip."""

import json

from tests.libtpu import needs_libtpu, run

BATCH, MAX_TOKENS = 16, 32_768

COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import models
from kvjax.empty import abstract_cache
from kvjax.decoding import compressed_decode
from kvjax.policy import Policy

batch, max_tokens = int(sys.argv[2]), int(sys.argv[3])
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1])
mesh = Mesh(np.array(topology.devices).reshape(1, 8), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
model = models.abstract_model(models.published_config("qwen3-8b"), mesh=mesh)
cache = abstract_cache(
    model.cache_shape, policy=Policy(), batch=batch, max_tokens=max_tokens, placement=model.placement
)
tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=model.placement.sharding("B T", (batch, 1)))
memory = compressed_decode.lower(model, cache, tokens).compile().memory_analysis()
print("RESULT", json.dumps({
    "arguments": memory.argument_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporary": memory.temp_size_in_bytes,
}))
"""


@needs_libtpu
def test_qwen3_8b_decodes_on_v6e_2x4(record_property):
    done = run(COMPILE, "v6e:2x4", str(BATCH), str(MAX_TOKENS))
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stderr[-3000:]
    memory = json.loads(results[0].removeprefix("RESULT "))
    record_property("print", f"Qwen3-8B on v6e:2x4, batch {BATCH}, {MAX_TOKENS} tokens, bytes per chip: {memory}")
    weights = 8_190_735_360 * 2 / 8
    cache = 36 * 2 * BATCH * (8 // 8) * MAX_TOKENS * 128 * 2
    assert weights + cache < memory["arguments"] < 1.02 * (weights + cache)
    assert memory["aliased"] >= cache  # updated in place
    assert memory["temporary"] < 0.05 * cache  # no second copy of it
    assert memory["arguments"] + memory["temporary"] < 32e9  # of a v6e chip's 32 GB
