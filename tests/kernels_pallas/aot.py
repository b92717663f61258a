"""Compiles an operation's cases for TPUs that are not there, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def one_device():
    """A mesh of the device that JAX runs on."""
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def needs_libtpu(test):
    """Marks a test that compiles for chips that are not there."""
    there = importlib.util.find_spec("libtpu") is not None
    skipped = pytest.mark.skipif(not there, reason="needs libtpu, the TPU compiler: pip install 'kvjax[aot]'")
    return pytest.mark.tpu_aot(pytest.mark.slow(skipped(test)))


COMPILE = """
import importlib, sys
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

cases = importlib.import_module(sys.argv[1]).CASES
topology = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[2])
mesh = Mesh(np.array(topology.devices)[:1].reshape(1, 1), ("data", "model"))
placed = NamedSharding(mesh, PartitionSpec())
for case in cases:
    function, shapes = case.build(mesh)
    compiled = jax.jit(function, in_shardings=placed, out_shardings=placed).lower(*shapes).compile()
    assert "tpu_custom_call" in compiled.as_text(), case.name
    print("COMPILED", case.name)
"""


def compile_cases(module, topology):
    """Names of the cases in a module that compile, with the kernel in them.

    Raises:
      AssertionError: the compiler refused one.
    """
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
    command = [sys.executable, "-c", COMPILE, module, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("COMPILED ") for line in done.stdout.splitlines() if line.startswith("COMPILED ")]
