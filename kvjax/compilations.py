"""How often functions are compiled: a decode step compiles once, whatever tokens, rounds and evictions come."""

import collections
import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[collections.Counter[str]]:
    """Counts what XLA compiles while the context is open, by the name of the jitted function."""
    counts: collections.Counter[str] = collections.Counter()

    def listen(event: str, seconds: float, **facts: str | int) -> None:
        del seconds
        if event == _EVENT:
            name = str(facts.get("fun_name", ""))
            counts[name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
