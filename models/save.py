"""Writes a model as a Hugging Face checkpoint folder: config.json and one safetensors file."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from models.hf_config import config_fields
from models.hf_weights import Weight
from models.transformer import Transformer


def save_checkpoint(model: Transformer, folder: str | Path, *, dtype: str = "bfloat16") -> None:
    """Writes `config.json` and `model.safetensors`; the tokenizer's files are the caller's.

    Args:
      model: the model, its parameters on this host.
      folder: made if missing.
      dtype: dtype of the stored tensors.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = jax.device_get(variable[...]).astype(dtype)
        weight = Weight(".".join(map(str, path)), variable.axes, value.shape)
        tensors[weight.tensor_name] = weight.to_tensor(np.asarray(value))
    fields = {**config_fields(model.config), "torch_dtype": dtype}
    (target / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
