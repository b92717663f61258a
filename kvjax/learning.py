"""A training step, its state, and the state on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from kvjax.errors import UserError
from models.checkpoint import parameter_tree, with_parameters
from models.transformer import Transformer


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
    """AdamW with clipping, to be scaled by a learning rate; only matrices decay."""

    def decays(model: Transformer) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, model)

    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


def make_step(optimizer: optax.GradientTransformation) -> Callable[..., tuple[TrainState, jax.Array]]:
    """The compiled training step: (state, rows, weights, learning rate) -> (state, loss); the state is donated."""

    def step(state: TrainState, rows: jax.Array, weights: jax.Array, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, gradients = jax.value_and_grad(weighted_loss)(state.model, rows, weights)
        updates, moments = optimizer.update(gradients, state.optimizer, state.model)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return TrainState(optax.apply_updates(state.model, updates), moments), loss

    return jax.jit(step, donate_argnums=0)


class Checkpoints:
    """The run's checkpoints: the newest two, whatever was finished of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, place: Place, state: TrainState) -> None:
        """Writes the state and where the run is."""
        self._manager.save(place.step, args=ocp.args.StandardSave(_as_tree(state, place)))
        self._manager.wait_until_finished()

    def restore(self, state: TrainState) -> tuple[Place, TrainState]:
        """The newest place and state; the beginning and the given state where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return Place(), state
        try:
            tree = self._manager.restore(step, args=ocp.args.StandardRestore(_as_tree(state, Place())))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoints in {self._folder} are of another model: set config.checkpoint_folder to a new folder."
            ) from error
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
