"""Compiles Qwen3-8B's decode step for a slice of eight TPU chips that is not there, and prints bytes per chip."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler: pip install 'kvjax[aot]'"
    ),
]

BATCH, MAX_TOKENS = 16, 32_768

# A process of its own: libtpu reads its environment once, and other tests pretend that CPUs are eight devices.
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


def test_qwen3_8b_decodes_on_v6e_2x4(record_property):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        PYTHONPATH=str(Path(__file__).resolve().parent.parent.parent),
    )
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, "v6e:2x4", str(BATCH), str(MAX_TOKENS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
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
