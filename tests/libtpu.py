"""Runs scripts with the TPU compiler, which compiles for chips that are not there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas._tpu import LIBTPU


def needs_libtpu(test):
    """Marks a test that compiles for chips that are not there."""
    there = importlib.util.find_spec("libtpu") is not None
    skipped = pytest.mark.skipif(not there, reason="needs libtpu, the TPU compiler: pip install 'kvjax[aot]'")
    return pytest.mark.tpu_aot(pytest.mark.slow(skipped(test)))


def run(script, *arguments):
    """A script in a process of its own: libtpu reads its environment once, and tests pretend that CPUs are devices."""
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
        PYTHONPATH=str(Path(__file__).resolve().parent.parent),
        **LIBTPU,
    )
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
