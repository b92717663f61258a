"""DeepSeek-R1-Distill-Qwen-7B on one GPU with 24 GB or more: long chains of thought, temperature 0.6 as advised.

python -m kvjax.decode --config=configs/deepseek_r1_distill_gpu.py --prompt='How many primes are below 100?'
"""

from ml_collections import ConfigDict

from configs.base import decode_config


def get_config() -> ConfigDict:
    """The settings."""
    config = decode_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    config.dtype = "bfloat16"
    config.chat = True
    config.prompt = "How many primes are below 100?"
    config.batch = 4
    config.max_tokens = 16384
    config.max_new_tokens = 8192
    config.steps_per_dispatch = 32
    config.sampling.temperature = 0.6
    config.sampling.top_p = 0.95
    return config
