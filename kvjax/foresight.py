"""Foresight: what queries to come will attend to, from a pass over a text whose end is known. For the oracle alone.

queries      [ ... block 0 ... | ... block 1 ... | ... ]           blocks of C positions
future[j]    each token's largest weight from the queries of block j and of all later blocks
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvjax import axes
from kvjax._kernels import Segment, decode_attention
from kvjax.causal import causal_attention
from kvjax.sharding import Placement

BLOCK = 16
"""Queries whose weights are not told apart."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=("future",), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerFuture:
    """What a layer's tokens will be worth.

    Attributes:
      future: `B J K T` float32; None before the pass.
    """

    future: Any = None


def foresee_layer(
    layer: LayerFuture,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, LayerFuture]:
    """A plain causal pass, and the weights that tokens get from the queries of each block and of those after it.

    Args:
      layer: takes its name only.
      queries: `B T N D`, rotated, T a multiple of `BLOCK`.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`: 0, 1, ..., then -1 past a row's length.
      output: the block's output projection; not used.
      placement: where the arrays live; not used.
    """
    del layer, output, placement
    batch, num_tokens = positions.shape
    cached = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # B K T D
    scale = 1.0 / math.sqrt(queries.shape[-1])

    def weigh(_: None, block: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        segment = Segment.of_arrays(block[0], cached[0], values=cached[1], positions=positions)
        return None, decode_attention((segment,), query_positions=block[1], scale=scale, mass="peak")[0].mass

    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(batch, num_tokens // BLOCK, BLOCK, *array.shape[2:]), 1, 0)

    _, peaks = jax.lax.scan(weigh, None, (split(queries), split(positions)))  # J B K T
    suffix = jax.lax.cummax(peaks, axis=0, reverse=True)
    attended = causal_attention(queries, keys, values=values, positions=positions)
    return attended, LayerFuture(future=jnp.moveaxis(suffix, 0, 1))
