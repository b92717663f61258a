"""The oracle: keeps what later queries will attend to. It knows the future, and serves to judge the others by.

    s_j = max over the queries i that are still to come, and over the group, of softmax_j( q_i . k_j / sqrt(D) )

as an uncompressed cache has it. A task on which even the oracle fails at a budget says nothing about methods. It is not
among `kvjax/selections/`: nobody can decode with it, and `kvjax.evaluate` alone tells it the future.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import axes
from kvjax.cache import KVCache, LayerCache
from kvjax.foresight import BLOCK, LayerFuture
from kvjax.policy import Policy
from kvjax.selection import Scores, Selection, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oracle(Selection):
    """Keeps the tokens that queries to come attend to."""

    def score(self, view: View) -> Scores:
        """The largest weight from queries at positions not seen yet, those of the running block among them."""
        future = view.arrays["future"]  # B J K T
        coming = jnp.minimum(view.num_seen // BLOCK, future.shape[1] - 1)
        weights = jnp.take_along_axis(future, coming[:, None, None, None], axis=1)[:, 0]  # B K T
        places = jnp.clip(view.positions, 0, future.shape[3] - 1)
        return jnp.take_along_axis(weights, places, axis=2)


def oracle_of(policy: Policy, *, text: str) -> Policy:
    """The same policy with the oracle as its selection.

    Args:
      policy: with a selection that evicts.
      text: what to call it.
    """
    return dataclasses.replace(policy, selection=Oracle(budget=policy.selection.budget), text=text)


@jax.jit
def _pass(model: Any, tokens: axes.Tokens, positions: axes.Positions) -> tuple[LayerFuture, ...]:
    layers = tuple(LayerFuture() for _ in range(model.cache_shape.num_layers))
    return model(tokens, positions=positions, layers=layers, phase="foresee")[1]


def look_ahead(model: Any, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> tuple[jax.Array, ...]:
    """The future of whole texts, prompt, question and answer together: one `B J K T` a layer.

    Args:
      model: the model.
      tokens: `B T` int32, padding on the right.
      lengths: `B`, tokens of each row.
    """
    padded = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % BLOCK)))
    offsets = jnp.arange(padded.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(offsets < lengths[:, None], offsets, axes.EMPTY)
    return tuple(layer.future for layer in _pass(model, padded, positions))


def with_future(cache: KVCache, futures: Sequence[jax.Array]) -> KVCache:
    """An oracle's empty cache that knows the future; who donates the cache donates these arrays with it."""
    return _with_arrays(cache, [{"future": future} for future in futures])


def without_future(cache: KVCache) -> KVCache:
    """The same without it, to count the bytes that a method would take."""
    return _with_arrays(cache, [{}] * len(cache.layers))


def _with_arrays(cache: KVCache, arrays: Sequence[dict[str, jax.Array]]) -> KVCache:
    def tell(layer: LayerCache, known: dict[str, jax.Array]) -> LayerCache:
        if layer.state is None:  # at the edges nothing is evicted
            return layer
        return dataclasses.replace(layer, state=dataclasses.replace(layer.state, arrays=known))

    return dataclasses.replace(cache, layers=tuple(map(tell, cache.layers, arrays)))
