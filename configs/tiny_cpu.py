"""The model in the tree, on any machine.

    python -m kvjax.decode
    python -m kvjax.decode --prompt='Call me Ishmael.' --config.max_new_tokens=400

1.08 million parameters that have read Shakespeare, Moby Dick and school problems byte by byte: it writes English,
not sense.
"""

from ml_collections import ConfigDict

from configs.base import decode_config


def get_config() -> ConfigDict:
    """The settings."""
    config = decode_config("models/tiny")
    config.dtype = "float32"
    config.prompt = "KING RICHARD:\n"
    config.max_new_tokens = 300
    config.sampling.temperature = 0.7
    config.sampling.top_p = 0.95
    return config
