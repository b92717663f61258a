"""Compiles an operation's cases for TPUs that are not there, in a process of its own."""

import jax

from tests.libtpu import run

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


def one_device():
    """A mesh of the device that JAX runs on."""
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


COMPILE = """
import importlib, sys
from kernels_pallas.schedule import compile_case

for case in importlib.import_module(sys.argv[1]).CASES:
    assert "tpu_custom_call" in compile_case(case, sys.argv[2]).as_text(), case.name
    print("COMPILED", case.name)
"""


def compile_cases(module, topology):
    """Names of the cases in a module that compile, with the kernel in them.

    Raises:
      AssertionError: the compiler refused one.
    """
    done = run(COMPILE, module, topology)
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("COMPILED ") for line in done.stdout.splitlines() if line.startswith("COMPILED ")]
