"""Flax ports of Llama- and Qwen-style decoders, and their loading from Hugging Face checkpoint folders."""

from models.checkpoint import restore_params, save_params
from models.config import ModelConfig
from models.hf_config import published_config, read_config
from models.initialise import initialise, randomise
from models.load import abstract_model, load_model
from models.save import save_checkpoint
from models.transformer import Transformer

__all__ = [
    "ModelConfig",
    "Transformer",
    "abstract_model",
    "initialise",
    "load_model",
    "published_config",
    "randomise",
    "read_config",
    "restore_params",
    "save_checkpoint",
    "save_params",
]
