"""Loads a Hugging Face checkpoint folder straight into (sharded) arrays, without torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.errors import UserError, unknown
from kvjax.folder import find_checkpoint
from kvjax.sharding import Placement
from models.config import DTYPES, ModelConfig
from models.hf_config import read_config
from models.hf_weights import Weight
from models.safetensors_folder import SafetensorsFolder
from models.transformer import Transformer

_IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that old checkpoints carry and nothing reads."""


def load_model(folder: str | Path, *, mesh: Mesh | None = None, dtype: str | jnp.dtype | None = None) -> Transformer:
    """Loads a model.

    Each device's part of each tensor is read, turned and cast on its own, so host memory holds one such part at a
    time and never the model.

    Args:
      folder: a checkpoint folder, or a hub name.
      mesh: a mesh with axes "data" and "model" (`kvjax.make_mesh`); None for the default device.
      dtype: dtype of parameters and activations; None for the checkpoint's own.

    Returns:
      The model, ready for `init_cache`, `prefill`, `compressed_decode` and `generate`.

    Raises:
      UserError: a file is missing or broken, or holds something that is not supported; the message names it.
    """
    path = find_checkpoint(folder)
    config = read_config(path / "config.json")
    model = abstract_model(config, mesh=mesh, dtype=dtype)
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    weights = [Weight(".".join(map(str, keys)), variable.axes, _shape(variable)) for keys, variable in flat]
    tensors = SafetensorsFolder(path)
    _check_tensors(tensors, weights, config=config, folder=path)
    loaded = [
        (keys, variable.replace(_load(tensors, weight, placement=model.placement, dtype=_dtype(variable))))
        for (keys, variable), weight in zip(flat, weights, strict=True)
    ]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def abstract_model(
    config: ModelConfig, *, mesh: Mesh | None = None, dtype: str | jnp.dtype | None = None
) -> Transformer:
    """A model whose parameters are shapes and shardings only: for loading, and for compiling without weights.

    Args:
      config: dimensions.
      mesh: where the parameters would live; its devices need not be there.
      dtype: their dtype; None for the config's own.
    """
    wanted = config.dtype if dtype is None else dtype
    name = wanted if isinstance(wanted, str) else jnp.dtype(wanted).name
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    placement = Placement(mesh)
    shapes = nnx.eval_shape(lambda: Transformer(config, dtype=name, placement=placement))
    graph, state = nnx.split(shapes)

    def placed(variable: nnx.Variable) -> nnx.Variable:
        shape, kind = _shape(variable), _dtype(variable)
        return variable.replace(jax.ShapeDtypeStruct(shape, kind, sharding=placement.sharding(variable.axes, shape)))

    return nnx.merge(graph, nnx.from_flat_state([(keys, placed(leaf)) for keys, leaf in nnx.to_flat_state(state)]))


def _shape(variable: nnx.Variable) -> tuple[int, ...]:
    return tuple(variable.get_value().shape)


def _dtype(variable: nnx.Variable) -> jnp.dtype:
    return variable.get_value().dtype


def _check_tensors(tensors: SafetensorsFolder, weights: list[Weight], *, config: ModelConfig, folder: Path) -> None:
    """Refuses a folder that lacks a tensor, has one of another shape, or holds one that nothing would read."""
    for weight in weights:
        tensors.check(weight.tensor_name, weight.tensor_shape)
    read = {weight.tensor_name for weight in weights}
    if config.tied_embeddings:
        read.add("lm_head.weight")  # some checkpoints store the tied copy too
    left = sorted(name for name in tensors.names() - read if not name.endswith(_IGNORED))
    if left:
        raise UserError(
            f"{folder} holds {len(left)} tensor(s) that a '{config.model_type}' model of this config.json does not "
            f"have, the first is '{left[0]}': is model_type right?"
        )


def _load(tensors: SafetensorsFolder, weight: Weight, *, placement: Placement, dtype: jnp.dtype) -> jax.Array:
    """One parameter, each device's part read by itself."""

    def part(index: tuple[slice, ...]) -> np.ndarray:
        shape = tuple(len(range(*cut.indices(size))) for cut, size in zip(index, weight.shape, strict=True))
        stored = tensors.read(weight.tensor_name, weight.tensor_slices(index))
        return np.ascontiguousarray(weight.from_tensor(stored, shape).astype(dtype))

    sharding = placement.sharding(weight.axes, weight.shape)
    if sharding is None:
        return jax.device_put(part((slice(None),) * len(weight.shape)))
    return jax.make_array_from_callback(weight.shape, sharding, part)
