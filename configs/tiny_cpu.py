"""The model in the tree, on any machine: it solves a task with a compressed cache, beside the uncompressed one.

    python -m kvjax.decode
    python -m kvjax.decode --config.task_example=1 --config.policy='streaming(budget=256)'
    python -m kvjax.decode --prompt='Call me Ishmael.' --config.max_new_tokens=100

1.08 million parameters that have learned nine tasks in symbols (`kvjax/tasks/`), and have read Shakespeare, Moby Dick
and school problems byte by byte: it writes English, not sense.
"""

from ml_collections import ConfigDict

from configs.base import decode_config


def get_config() -> ConfigDict:
    """The settings."""
    config = decode_config("models/tiny")
    config.dtype = "float32"
    config.policy = "triattention(budget=256)+int4+exact(sinks=4,window=16,round=16)"
    config.task = "sums(tokens=480)"
    config.compare_with_full = True
    config.max_new_tokens = 300
    config.sampling.temperature = 0.0
    return config
