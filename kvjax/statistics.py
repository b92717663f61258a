"""Statistics of a model's queries, keys and values, layer by layer, gathered in one pass over any text.

Codecs are fitted to them (means, principal components, OSCAR's rotations), and selections that score keys by what
queries expect use them. All are running means over tokens in float32, so a text of any length streams through. Files of
them are `kvjax/statistics_file.py`'s.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kvjax import axes
from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope, turns_at, unrotate


@functools.partial(jax.tree_util.register_dataclass, data_fields=("mean", "second"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and second moments of vectors.

    Attributes:
      mean: `K D`; `N D` of queries.
      second: E[x x^T] of g neighbouring heads together, `K/g gD gD`; `N D D` of queries.
    """

    mean: Any
    second: Any

    def second_of(self, heads: int, *, centred: bool) -> np.ndarray:
        """Second moments of `heads` neighbouring heads together, `K/heads hD hD`; about the mean if `centred`.

        Raises:
          UserError: they were gathered for fewer heads together.
        """
        mean, second = np.asarray(self.mean), np.asarray(self.second)
        size, group = mean.shape[1], second.shape[1] // mean.shape[1]
        if group % heads:
            raise UserError(
                f"The statistics hold {group} key/value heads together, and heads={heads} is asked for: calibrate "
                f"again with --heads={heads}."
            )
        blocks = second.reshape(-1, group // heads, heads * size, group // heads, heads * size)
        own = np.stack([blocks[:, index, :, index] for index in range(group // heads)], axis=1)
        own = own.reshape(-1, heads * size, heads * size)
        if not centred:
            return own
        joined = mean.reshape(-1, heads * size)
        return own - joined[:, :, None] * joined[:, None, :]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        "num_tokens",
        "keys",
        "keys_before_rope",
        "values",
        "queries_second",
        "queries",
        "queries_norm",
        "values_weighted",
        "value_weight",
    ),
    meta_fields=("rope",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """What passed through one layer's attention; all means over tokens. None where a file does not have it.

    Attributes:
      num_tokens: scalar float32, tokens counted.
      keys: `Moments` of keys as they are cached.
      keys_before_rope: of the same before their rotation, after key norm and bias.
      values: of values.
      queries_second: E[q q^T] of rotated queries, over the query heads of each key/value head, `K D D`.
      queries: `Moments` of queries before RoPE, after query norm and bias, `N D` and `N D D`.
      queries_norm: mean length of each band's pair of numbers (f, f + D/2), before RoPE, `N D/2`.
      values_weighted: E[w v v^T], w = k^T E[q q^T] k, `K D D`.
      value_weight: E[w], `K`.
      rope: of the model (static).
    """

    num_tokens: Any
    keys: Moments | None
    keys_before_rope: Moments | None
    values: Moments | None
    queries_second: Any
    queries: Moments | None
    queries_norm: Any
    values_weighted: Any
    value_weight: Any
    rope: Rope

    @property
    def values_weighted_second(self) -> np.ndarray:
        """Second moments of values, each token's weight at a mean of 1, `K D D`."""
        weight = np.maximum(np.asarray(self.value_weight), 1e-30)
        return np.asarray(self.values_weighted) / weight[:, None, None]


def empty_statistics(shape: ModelShape, *, heads: int = 1) -> tuple[LayerStatistics, ...]:
    """Statistics of no tokens, one a layer.

    Args:
      shape: of the model.
      heads: neighbouring key/value heads whose moments are gathered together, a divisor of K.
    """
    num_query_heads, num_kv_heads, size = shape.num_query_heads, shape.num_kv_heads, shape.head_size

    def moments() -> Moments:
        return Moments(
            mean=jnp.zeros((num_kv_heads, size)),
            second=jnp.zeros((num_kv_heads // heads, heads * size, heads * size)),
        )

    def layer() -> LayerStatistics:
        return LayerStatistics(
            num_tokens=jnp.zeros(()),
            keys=moments(),
            keys_before_rope=moments(),
            values=moments(),
            queries_second=jnp.zeros((num_kv_heads, size, size)),
            queries=Moments(mean=jnp.zeros((num_query_heads, size)), second=jnp.zeros((num_query_heads, size, size))),
            queries_norm=jnp.zeros((num_query_heads, size // 2)),
            values_weighted=jnp.zeros((num_kv_heads, size, size)),
            value_weight=jnp.zeros((num_kv_heads,)),
            rope=shape.rope,
        )

    return tuple(layer() for _ in range(shape.num_layers))


def observe(
    layer: LayerStatistics,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
) -> LayerStatistics:
    """Statistics with the tokens of this call counted in.

    Args:
      layer: the statistics so far.
      queries: `B T N D`, rotated.
      keys: `B T K D`, rotated.
      values: `B T K D`.
      positions: `B T`; -1 does not count.
    """
    valid = (positions >= 0).astype(jnp.float32)
    new = jnp.sum(valid)
    share = new / jnp.maximum(layer.num_tokens + new, 1.0)

    def update(old: jax.Array, total: jax.Array) -> jax.Array:
        return old + (total / jnp.maximum(new, 1.0) - old) * share

    def moments(old: Moments, vectors: jax.Array) -> Moments:
        masked = vectors * valid[:, :, None, None]
        num_blocks = old.second.shape[0]
        joined = masked.reshape(*masked.shape[:2], num_blocks, -1)
        return Moments(
            mean=update(old.mean, jnp.sum(masked, axis=(0, 1))),
            second=update(old.second, _products(joined, joined)),
        )

    queries, keys, values = (array.astype(jnp.float32) for array in (queries, keys, values))
    turns = turns_at(layer.rope, positions)
    plain_queries, plain_keys = unrotate(queries, turns), unrotate(keys, turns)
    grouped = (queries * valid[:, :, None, None]).reshape(*queries.shape[:2], keys.shape[2], -1, queries.shape[3])
    rows = jnp.swapaxes(grouped, 2, 3).reshape(queries.shape[0], -1, keys.shape[2], queries.shape[3])  # B TG K D
    queries_second = update(layer.queries_second, _products(rows, rows) / grouped.shape[3])
    met = jnp.einsum("BTKD,KDR->BTKR", keys, queries_second)
    weights = jnp.sum(met * keys, axis=-1) * valid[:, :, None]  # B T K
    first, second = jnp.split(plain_queries * valid[:, :, None, None], 2, axis=-1)
    return LayerStatistics(
        num_tokens=layer.num_tokens + new,
        keys=moments(layer.keys, keys),
        keys_before_rope=moments(layer.keys_before_rope, plain_keys),
        values=moments(layer.values, values),
        queries_second=queries_second,
        queries=moments(layer.queries, plain_queries),
        queries_norm=update(layer.queries_norm, jnp.sum(jnp.sqrt(first**2 + second**2), axis=(0, 1))),
        values_weighted=update(layer.values_weighted, _products(values * weights[..., None], values)),
        value_weight=update(layer.value_weight, jnp.sum(weights, axis=(0, 1))),
        rope=layer.rope,
    )


def _products(one: Float[Array, "B T K D"], other: Float[Array, "B T K D"]) -> Float[Array, "K D D"]:
    """Sums over tokens of the products of two vectors' numbers."""
    rows, columns = (jnp.moveaxis(array, 2, 0).reshape(array.shape[2], -1, array.shape[3]) for array in (one, other))
    return jnp.swapaxes(rows, 1, 2) @ columns


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a model.

    Attributes:
      layers: one `LayerStatistics` a layer, numpy arrays.
      shape: the model that they belong to.
      source: where they come from, for messages.
      about: what else the file says: the text, tokens, the date.
    """

    layers: tuple[LayerStatistics, ...]
    shape: ModelShape
    source: str = "memory"
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, shape: ModelShape) -> None:
        """Raises `UserError` unless they belong to a model of this shape, RoPE and config."""
        names = ("num_layers", "num_query_heads", "num_kv_heads", "head_size", "rope", "fingerprint")
        for name in names:
            theirs, ours = getattr(self.shape, name), getattr(shape, name)
            if theirs != ours:
                what = "config (its hash)" if name == "fingerprint" else name
                raise UserError(
                    f"The statistics {self.source} belong to another model: their {what} is {theirs}, the model's is "
                    f"{ours}. Write the model's own with python -m kvjax.calibrate."
                )
