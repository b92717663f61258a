"""Runs scripts with the GPU compiler, which compiles for an H200 that is not there."""

import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

H200 = {
    "core_count": 132,
    "threads_per_warp": 32,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_block_optin": 232_448,
    "shared_memory_per_core": 233_472,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "l2_cache_size": 60 * 2**20,
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 150_000_000_000,
}

LEAST_SHARED_MEMORY = 99 * 2**10
"""Bytes that a program may have on every device since compute capability 8.0: 8.6, 8.9 and 12.0 have these."""


def needs_cuda(test):
    """Marks a test that compiles for a GPU that is not there."""
    there = importlib.util.find_spec("jax_cuda13_plugin") is not None
    skipped = pytest.mark.skipif(not there, reason="needs CUDA's compiler: pip install 'kvjax[gpu]'")
    return pytest.mark.gpu_aot(pytest.mark.slow(skipped(test)))


def h200_devices():
    """One H200, to compile for."""
    from jax.experimental import topologies

    facts = " ".join(f"{key}: {value}" for key, value in H200.items())
    target = (
        f"gpu_device_info {{ {facts} cuda_compute_capability {{ major: 9 feature_extension: 2 }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H200"'
    )
    return topologies.get_topology_desc("h200", "cuda", target_config=target, topology="1x1x1").devices[:1]


def compile_kernel(function, shapes, *, name, folder):
    """Compiles a function for an H200 and prints the registers, spilled bytes and shared memory of a kernel in it.

    In a process of its own, whose flags dump into the folder.
    """
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.array(h200_devices()), ("x",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with jax.default_device(mesh.devices.flat[0]):  # which newer JAX asks what it can do
        lowered = jax.jit(function, in_shardings=placed, out_shardings=placed).lower(*shapes)
    lowered.compile()
    (ptx,) = [path for path in glob.glob(f"{folder}/*.ptx") if f".entry {name}" in Path(path).read_text()]
    (thunks,) = glob.glob(f"{folder}/*thunk_sequence.txt")
    shared = re.search(rf" {name} grid.*shared_memory: (\d+) bytes", Path(thunks).read_text())
    command = [ptxas(), "-v", "-arch=sm_90a", "-o", f"{folder}/out.cubin", ptx]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (said,) = [text for text in said.split("Compiling entry function") if text.startswith(f" '{name}")]
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    print(json.dumps([int(found[1]) for found in (registers, spilled, shared)]))


def ptxas():
    """The assembler that came with the plugin, or another."""
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    found = [path for folder in folders for path in glob.glob(f"{folder}/*/bin/ptxas")]
    return found[0] if found else shutil.which("ptxas")


def resources(command, folder, record_property):
    """Registers and spilled bytes of a kernel that `compile_kernel` compiles where a file is run with these arguments.

    Its shared memory is what every device has.
    """
    done = run([*command, str(folder)], dump=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    registers, spilled, shared = json.loads(done.stdout.splitlines()[-1])
    name = f"{Path(command[0]).parent.name} {' '.join(command[1:])}"
    text = f"{name:40} {registers:3} registers, {spilled:3} bytes spilled, {shared:6} bytes of shared memory"
    record_property("print", text)
    assert shared <= LEAST_SHARED_MEMORY
    return registers, spilled


def run(command, *, dump=None):
    """Python in a process of its own, which XLA's flags are for; its dump goes into a folder."""
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        XLA_FLAGS="" if dump is None else f"--xla_dump_to={dump} --xla_dump_emitter_re=.*",
        PYTHONPATH=str(Path(__file__).resolve().parent.parent),
    )
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
