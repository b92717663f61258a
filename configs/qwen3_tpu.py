"""Qwen3-8B on the chips of one TPU host, e.g. a v6e-8 or v5e-8.

    python -m kvjax.decode --config=configs/qwen3_tpu.py --prompt='Why is the sky blue?'

Key/value heads go over the chips; with more than 8 chips, set mesh.data for the rest.
"""

from ml_collections import ConfigDict

from configs.base import decode_config


def get_config() -> ConfigDict:
    """The settings."""
    config = decode_config("Qwen/Qwen3-8B")
    config.dtype = "bfloat16"
    config.chat = True
    config.template.enable_thinking = True
    config.prompt = "Why is the sky blue?"
    config.batch = 16
    config.max_tokens = 8192
    config.max_new_tokens = 4096
    config.steps_per_dispatch = 32
    config.mesh.model = -1
    return config
