"""Strictness for all tests, and the fixtures that many share."""

import gc
import itertools
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling, which this and the short way below halve and halve again. Tests that are about the
# compiled program itself, its memory or what it updates in place, are marked `optimised`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import compiler  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


SHORT_WAY = ("xla_cpu_use_fusion_emitters", False)
"""To LLVM, and not by MLIR; later compilers have lost it."""


def pytest_sessionstart():
    """Has CPU programs compiled the short way where the compiler knows it, but for tests marked `optimised`.

    JAX has no setting for it, and `XLA_FLAGS` would hold for those tests too.
    """
    try:
        jax.jit(lambda: 0, compiler_options=dict([SHORT_WAY]))()
    except jax.errors.JaxRuntimeError:
        return
    options_of_users = compiler.get_compile_options

    def quick_options(*args, **kwargs):
        options = options_of_users(*args, **kwargs)
        quick = options.executable_build_options.debug_options.xla_llvm_disable_expensive_passes
        if quick and kwargs["backend"].platform == "cpu":
            options.env_option_overrides = [*options.env_option_overrides, SHORT_WAY]
        return options

    compiler.get_compile_options = quick_options


def pytest_collection_finish():
    """Modules and tests stay, and tracing makes many objects: Python looks through fewer of them, and less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


MOST_MAPS = 30_000
"""Memory maps, of which a process on Linux has 65,530 and each compiled function takes some: LLVM crashes without."""
TESTS = itertools.count(1)


def pytest_runtest_teardown():
    """Lets compiled functions go where there are many; looks at every 20th test."""
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def compiled_as_by_users(request):
    """Full optimisation for tests marked `optimised`."""
    if request.node.get_closest_marker("optimised") is None:
        yield
        return
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()


@pytest.fixture
def let_go():
    """Many compiled functions that serve no other test."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real tokenizers, configs and texts that lies beside the checkout."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data folder {SHARED_DATA}, which is not part of the tree")
    return SHARED_DATA


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints and arrays that other programs wrote."""
    return ROOT / "tests" / "golden"


def pytest_terminal_summary(terminalreporter):
    """Prints what tests recorded under "print", also where they ran in other processes."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "print" and report.when == "call":
                terminalreporter.write_line(text)
