"""Llama-3.1-8B-Instruct on the chips of one TPU host.

    python -m kvjax.decode --config=configs/llama3_tpu.py --prompt='Name three rivers of Spain.'

The checkpoint asks for its licence to be accepted on the hub; or set --config.model to a local folder.
"""

from ml_collections import ConfigDict

from configs.base import decode_config


def get_config() -> ConfigDict:
    """The settings."""
    config = decode_config("meta-llama/Llama-3.1-8B-Instruct")
    config.dtype = "bfloat16"
    config.chat = True
    config.prompt = "Name three rivers of Spain."
    config.batch = 16
    config.max_tokens = 8192
    config.max_new_tokens = 1024
    config.steps_per_dispatch = 32
    config.mesh.model = -1
    return config
