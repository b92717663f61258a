"""Compiles a decode step and a prompt for a mesh of TPU chips that are not there: kernels run on what each chip has."""

import json

import pytest

from tests.libtpu import needs_libtpu, run

# A layer with Qwen3-8B's heads over eight chips: four parts of the heads, two of the sequences.
COMPILE = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
import kvjax, models
from kvjax._kernels import implementations
from kvjax.decoding import compressed_decode
from kvjax.empty import abstract_cache
from kvjax.hlo import KERNEL, parse_program

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
mesh = Mesh(np.array(topology.devices).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
small = {"num_layers": 1, "width": 512, "feed_forward": 512, "vocab_size": 512}
model = models.abstract_model(dataclasses.replace(models.published_config("qwen3-8b"), **small), mesh=mesh)
policy = kvjax.parse_policy(sys.argv[1])
cache = abstract_cache(model.cache_shape, policy=policy, batch=4, max_tokens=1024, placement=model.placement)
function, count = {"step": (compressed_decode, 1), "prompt": (kvjax.prefill, 640)}[sys.argv[2]]
tokens = jax.ShapeDtypeStruct((4, count), jnp.int32, sharding=model.placement.sharding("B T", (4, count)))
_, program = parse_program(function.lower(model, cache, tokens).compile().as_text())
lines = [one for computation in program.values() for one in computation.values()]
sources = [re.search(r'op_name="([^"]*)/pallas_call"', one.rest).group(1) for one in lines if one.target == KERNEL]
print("RESULT", json.dumps({
    "stated": implementations(mesh),
    "kernels": sorted({source.rpartition("/")[2] for source in sources}),
    "exchanged": [one.name for one in lines if one.opcode.startswith(("all-gather", "all-to-all"))],
}))
"""


@needs_libtpu
@pytest.mark.parametrize(
    ("what", "kernels"),
    [
        ("step", ["attention_mass", "decode_attention", "encode", "select", "slots"]),
        ("prompt", ["attention_mass", "decode_attention", "encode", "select"]),
    ],
)
def test_kernels_run_on_each_chip_and_no_chip_asks_for_what_others_have(what, kernels):
    """A step with its round, and a prompt; nothing of a body, or of anything else, is gathered."""
    done = run(COMPILE, "snapkv(budget=384)+int4", what)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")] or [done.stderr[-3000:]]
    found = json.loads(line.removeprefix("RESULT "))
    assert found["stated"] == dict.fromkeys(("encode", "score", "select", "slots"), "mosaic_tpu")
    assert found["kernels"] == kernels
    assert found["exchanged"] == []
