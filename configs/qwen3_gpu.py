"""Qwen3-8B on one GPU with 24 GB or more.

python -m kvjax.decode --config=configs/qwen3_gpu.py --prompt='Why is the sky blue?'
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
    config.batch = 4
    config.max_tokens = 8192
    config.max_new_tokens = 4096
    config.steps_per_dispatch = 32
    return config
