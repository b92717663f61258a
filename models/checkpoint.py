"""Saves and restores parameters with orbax: a folder of our own layout, sharded, for models of our own training."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from kvjax.errors import UserError
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

    def describe(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        value = variable[...] if not isinstance(variable.get_value(), jax.ShapeDtypeStruct) else variable.get_value()
        sharding = model.placement.sharding(variable.axes, value.shape)
        if sharding is None:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    flat = [(keys, variable.replace(describe(variable))) for keys, variable in nnx.to_flat_state(nnx.state(model))]
    wanted = nnx.to_pure_dict(nnx.from_flat_state(flat))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path, wanted)
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise UserError(f"The checkpoint {path} does not hold this model: {error}") from error
    return with_parameters(model, tree)
