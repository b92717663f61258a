"""Strictness for all tests, and the fixtures that many share."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling, which this halves. Tests that are about the compiled program itself, its memory or
# what it updates in place, are marked `optimised`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


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
