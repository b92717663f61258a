"""Random weights: the recipe with which small models learn to retrieve, and plain noise for tests of shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models.transformer import Transformer

_EMBEDDING_STD = 1.0
_OUTPUT_STD = 1e-3  # projections that write into the residual stream
_HEAD_STD = 0.02


def initialise(model: Transformer, key: jax.Array) -> Transformer:
    """Returns the model with random weights from which it trains well.

    Embeddings have standard deviation 1, projections into the residual stream 0.001, the head 0.02, all others
    fan-in**-0.5. With the usual 0.02 everywhere the sublayers drown the identity of the tokens, and a model of a
    million parameters does not learn to look anything up.

    Args:
      model: a model whose projections are zero.
      key: a PRNG key.
    """
    return _fill(model, key, _recipe_std)


def randomise(model: Transformer, key: jax.Array, *, std: float) -> Transformer:
    """Returns the model with every projection, embedding and bias drawn with one standard deviation."""
    return _fill(model, key, lambda name, shape: std)


def _recipe_std(name: str, shape: tuple[int, ...]) -> float:
    if name.startswith("embedding"):
        return _EMBEDDING_STD
    if name.startswith("head"):
        return _HEAD_STD
    if ".output." in name or ".down." in name:
        return _OUTPUT_STD
    return 0.0 if name.endswith("bias") else shape[0] ** -0.5  # the first axis of every projection is M


def _fill(model: Transformer, key: jax.Array, std_of: Callable[[str, tuple[int, ...]], float]) -> Transformer:
    graph, state = nnx.split(model)
    filled = []
    for index, (path, variable) in enumerate(nnx.to_flat_state(state)):
        name = ".".join(map(str, path))
        value = variable[...]
        if not name.endswith("scale"):
            std = std_of(name, value.shape)
            noise = jax.random.normal(jax.random.fold_in(key, index), value.shape, jnp.float32) * std
            value = model.placement.put(noise.astype(value.dtype), variable.axes)
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))
