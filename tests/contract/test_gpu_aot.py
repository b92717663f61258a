"""Compiles the decode step for an H200 that is not there: what its buffers take, and how many kernels it is."""

import json

from tests.cuda import needs_cuda, run

# Two layers of Qwen3-8B: layers are alike.
COMPILE = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh
import models
from kvjax.empty import abstract_cache
from kvjax.decoding import compressed_decode
from kvjax.grammar import parse_policy
from tests.cuda import h200_devices

mesh = Mesh(np.array(h200_devices()).reshape(1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
config = dataclasses.replace(models.published_config("qwen3-8b"), num_layers=2)
model = models.abstract_model(config, mesh=mesh)
tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32, sharding=model.placement.sharding("B T", (1, 1)))
for text in sys.argv[1:]:
    policy = parse_policy(text)
    cache = abstract_cache(
        model.cache_shape, policy=policy, batch=1, max_tokens=32_768, placement=model.placement
    )
    with jax.default_device(mesh.devices.flat[0]):
        lowered = compressed_decode.lower(model, cache, tokens)
    compiled = lowered.compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    free = "parameter|constant|tuple|get-tuple-element|bitcast|after-all"  # of a step without a round
    step = re.findall(r"^  .* = .*? (?!(?:" + free + r")\\()[a-z-]+\\(", program[program.index("\\nENTRY "):], re.M)
    print("RESULT", json.dumps({
        "policy": text,
        "kernels": program.count('custom_call_target="__gpu$xla.gpu.triton"'),
        "launches": len(step),
        "cache": memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }))
"""

LAUNCHES = {"full": 59, "int4": 65, "kivi(bits=2)": 59, "turboquant(bits=2.5)": 74}
"""Kernels of a step of two layers, at most: each takes its time, however little it does."""


@needs_cuda
def test_a_step_copies_no_body(record_property):
    """Bodies that are copied would take as much as the cache; a round of KIVI turns its values' scales around."""
    done = run(["-c", COMPILE, *LAUNCHES])
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == len(LAUNCHES), done.stderr[-3000:]
    for memory in map(json.loads, lines):
        record_property(
            "print",
            f"H200 {memory['policy']}: cache {memory['cache']:,} bytes, temporary {memory['temporary']:,}, "
            f"{memory['launches']} kernels",
        )
        assert memory["kernels"] >= 4  # the exact segment and the body of each layer
        assert memory["launches"] <= LAUNCHES[memory["policy"]]
        assert memory["temporary"] < memory["cache"] / 2
