"""A training step, its state, and the state on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from kvjax.errors import UserError
from models.checkpoint import parameter_tree, with_parameters
from models.transformer import Transformer

_UPDATE_RMS = 0.2  # of AdamW's updates (arXiv 2502.16982)


class TrainState(NamedTuple):
    """What a step changes."""

    model: Transformer
    optimizer: optax.OptState


class Place(NamedTuple):
    """Where a run is: steps in all, the stage, and steps of that stage."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0


def _all_logits(model: Transformer, inputs: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1], dtype=jnp.int32), inputs.shape)
    hidden, _ = model(inputs, positions=positions)
    return model.logits(hidden)


def weighted_loss(model: Transformer, rows: Int[Array, "B T"], weights: Float[Array, "B T"]) -> jax.Array:
    """Cross entropy, nats, of each row's tokens given those before: their weighted mean.

    Args:
      model: the model.
      rows: `B T+1` int32.
      weights: `B T+1`, of each token as a target; the first one's is not used.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(_all_logits(model, rows[:, :-1]), rows[:, 1:])
    return jnp.sum(losses * weights[:, 1:]) / jnp.maximum(jnp.sum(weights[:, 1:]), 1e-6)


@jax.jit
def right_tokens(model: Transformer, rows: Int[Array, "B T"]) -> jax.Array:
    """Whether the most likely token is the one that comes, `B T`, for the tokens after the first."""
    return jnp.argmax(_all_logits(model, rows[:, :-1]), axis=-1) == rows[:, 1:]


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for all else, after clipping; updates are for a learning rate of 1.

    Muon (Jordan, 2024) with the update's size of AdamW (arXiv 2502.16982); only the layers' matrices decay.
    """

    def matrices(model: Transformer) -> Any:
        return jax.tree_util.tree_map_with_path(_matrix_axes, model)

    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.contrib.muon(
            1.0,
            weight_decay=config.weight_decay,
            consistent_rms=_UPDATE_RMS,
            muon_weight_dimension_numbers=matrices,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
        ),
    )


def _matrix_axes(path: Any, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Axes of a layer's matrix that are inputs, and those that are outputs; None for all other parameters."""
    name = jax.tree_util.keystr(path)
    if ".layers" not in name or leaf.ndim < 2:
        return None
    outputs = 2 if leaf.ndim == 3 and ".output." not in name else 1  # heads and their size: D N H, but N H D back
    axes = tuple(range(leaf.ndim))
    return optax.contrib.MuonDimensionNumbers(axes[:-outputs], axes[-outputs:])


def make_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, jax.Array]]:
    """The compiled training step: (state, rows, weights, learning rate) -> (state, loss); the state is donated."""

    def step(state: TrainState, rows: jax.Array, weights: jax.Array, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(weighted_loss)(state.model, rows, weights)
        updates, moments = optimizer.update(gradients, state.optimizer, state.model)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return TrainState(optax.apply_updates(state.model, updates), moments), loss

    return jax.jit(step, donate_argnums=0)


class Checkpoints:
    """The run's checkpoints: the newest two, whatever was finished of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=2),
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def save(self, place: Place, state: TrainState) -> None:
        """Writes the state and where the run is."""
        self._manager.save(place.step, args=ocp.args.StandardSave(_as_tree(state, place)))
        self._manager.wait_until_finished()

    def restore(self, state: TrainState) -> tuple[Place, TrainState]:
        """The newest place and state; the beginning and the given state where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return Place(), state
        wanted = _as_tree(state, Place())
        if _shapes(self._manager.item_metadata(step).tree) != _shapes(wanted):
            raise UserError(
                f"The checkpoints in {self._folder} are of another model: set config.checkpoint_folder to a new folder."
            )
        tree = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        leaves = [tree["optimizer"][name] for name in sorted(tree["optimizer"])]
        moments = jax.tree.unflatten(jax.tree.structure(state.optimizer), leaves)
        place = Place(*(int(number) for number in tree["place"]))
        return place, TrainState(with_parameters(state.model, tree["model"]), moments)

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


def _as_tree(state: TrainState, place: Place) -> dict[str, Any]:
    """The state as dicts of arrays."""
    moments = {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(state.optimizer))}
    return {"model": parameter_tree(state.model), "optimizer": moments, "place": np.asarray(place, np.int64)}


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path -> shape; orbax writes the numbers of layers as text."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
