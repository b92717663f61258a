"""Saves and restores parameters with orbax: a folder of our own layout, sharded, for models of our own training."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from kvjax.errors import UserError
from models.load import abstract_model
from models.transformer import Transformer


def parameter_tree(model: Transformer) -> dict[str, Any]:
    """The model's parameters as nested dicts of arrays with string keys, what orbax stores."""
    return nnx.to_pure_dict(nnx.state(model))


def with_parameters(model: Transformer, tree: dict[str, Any]) -> Transformer:
    """The model with the parameters of a tree that `parameter_tree` made."""
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def save_params(model: Transformer, folder: str | Path) -> None:
    """Writes the parameters; the folder must not exist yet.

    Args:
      model: the model, on any number of devices.
      folder: where to write.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute(), parameter_tree(model))


def restore_params(model: Transformer, folder: str | Path) -> Transformer:
    """Returns a model with the parameters of a folder, each read straight to its device(s).

    Args:
      model: a model of the same dimensions, concrete or abstract, which says where parameters live.
      folder: what `save_params` wrote.

    Raises:
      UserError: the folder is missing, or its arrays have other shapes.
    """
    path = Path(folder).absolute()
    if not path.is_dir():
        raise UserError(f"There is no checkpoint folder {path}.")

    wanted = parameter_tree(abstract_model(model.config, mesh=model.placement.mesh, dtype=model.cache_shape.dtype))
    if model.placement.mesh is None:
        here = jax.sharding.SingleDeviceSharding(model.placement.device)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), wanted)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path, wanted)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"The checkpoint {path} does not hold this model: {error}") from error
    return with_parameters(model, tree)
