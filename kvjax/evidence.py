"""Evidence: what a selection has gathered while tokens and queries passed a layer, and nothing that it did not ask for.

    numbers of a token    `B K S`, one array a name, beside the exact segment and beside the body; they move with it
    last queries          a ring of w, `B w N D`: the query at position p lies in slot p mod w
    moments of queries    running mean and second moments before RoPE, a row at a time

It is a pytree of fixed shapes in the layer's cache (`LayerCache.state`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax import axes
from kvjax.model_shape import ModelShape
from kvjax.rope import turns_at, unrotate
from kvjax.selection import Selection
from kvjax.sharding import Placement
from kvjax.stages.facts import Arrays


@functools.partial(jax.tree_util.register_dataclass, data_fields=("count", "mean", "second"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryMoments:
    """Of a row's queries before RoPE, its sinks apart.

    Attributes:
      count: `B` float32, queries counted.
      mean: `B N D`.
      second: E[q q^T], `B N D D`.
    """

    count: Any
    mean: Any
    second: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("exact", "body", "queries", "query_positions", "moments", "pages", "arrays"),
    meta_fields=("selection",),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a selection knows of a layer.

    Attributes:
      exact: name -> `B K S` float32 for the slots of the exact segment.
      body: the same for the body's slots, `B 1 S` where heads share a pool.
      queries: `B w N D`, rotated, in the model's dtype; None if not wanted.
      query_positions: `B w` int32; -1 is an empty slot.
      moments: `QueryMoments`, or None.
      pages: lowest and highest numbers of the body's pages, two of `B K pages D`, or None.
      arrays: what the selection was fitted to; no batch axis.
      selection: fitted to the layer (static).
    """

    exact: Any
    body: Any
    queries: Any
    query_positions: Any
    moments: Any
    pages: Any
    arrays: Arrays
    selection: Selection

    @property
    def mass(self) -> str | None:
        """The attention mass that attention is asked for."""
        return next((name for name in self.selection.numbers if name != "strength"), None)


def empty_evidence(
    selection: Selection,
    arrays: Arrays,
    *,
    shape: ModelShape,
    batch: int,
    exact_slots: int,
    body: tuple[int, int],
    placement: Placement,
) -> Evidence:
    """Evidence of no tokens.

    Args:
      selection: fitted to the layer.
      arrays: its arrays.
      shape: of the model.
      batch: B.
      exact_slots: S of the exact segment.
      body: heads (1 in a pool) and slots of the body.
      placement: where arrays live.
    """

    def numbers(heads: int, slots: int) -> dict[str, jax.Array]:
        return {
            name: placement.constrain(jnp.zeros((batch, heads, slots)), "B K S") for name in sorted(selection.numbers)
        }

    count, size = selection.num_queries, shape.head_size
    queries = moments = None
    if count:
        zeros = jnp.zeros((batch, count, shape.num_query_heads, size), jnp.dtype(shape.dtype))
        queries = placement.constrain(zeros, "B T N D")
    if selection.wants_moments:
        mean = placement.constrain(jnp.zeros((batch, shape.num_query_heads, size)), "B N D")
        moments = QueryMoments(
            count=placement.constrain(jnp.zeros((batch,)), "B"),
            mean=mean,
            second=placement.constrain(jnp.zeros((*mean.shape, size)), "B N D D"),
        )
    return Evidence(
        exact=numbers(shape.num_kv_heads, exact_slots),
        body=numbers(*body),
        queries=queries,
        query_positions=placement.constrain(jnp.full((batch, count), axes.EMPTY, jnp.int32), "B T") if count else None,
        moments=moments,
        pages=_empty_pages(selection, shape, batch, body, placement),
        arrays=jax.tree.map(jnp.asarray, arrays),
        selection=selection,
    )


def _empty_pages(
    selection: Selection, shape: ModelShape, batch: int, body: tuple[int, int], placement: Placement
) -> tuple[jax.Array, jax.Array] | None:
    if not selection.page:
        return None
    zeros = jnp.zeros((batch, body[0], body[1] // selection.page, shape.head_size), jnp.dtype(shape.dtype))
    return (placement.constrain(zeros, "B K S D"), placement.constrain(zeros, "B K S D"))


def hear(evidence: Evidence, queries: axes.Queries, *, positions: axes.Positions, shape: ModelShape) -> Evidence:
    """Evidence with the queries of new tokens.

    Args:
      evidence: so far.
      queries: `B T N D`, rotated.
      positions: `B T`, ascending, -1 on the right is padding.
      shape: of the model.
    """
    if evidence.queries is not None:
        evidence = _ring(evidence, queries, positions)
    if evidence.moments is not None:
        evidence = dataclasses.replace(evidence, moments=_update(evidence.moments, queries, positions, shape))
    return evidence


def _ring(evidence: Evidence, queries: axes.Queries, positions: axes.Positions) -> Evidence:
    """Writes the newest queries over the oldest."""
    size = evidence.queries.shape[1]
    first, last = positions[:, :1], jnp.max(positions, axis=1, keepdims=True)
    slots = jnp.arange(size, dtype=jnp.int32)[None]
    newest = last - (last - slots) % size  # B w: the newest position that falls into each slot
    is_new = (newest >= first) & (first >= 0)
    places = jnp.clip(newest - first, 0, positions.shape[1] - 1)
    new = jnp.take_along_axis(queries, places[:, :, None, None], axis=1).astype(evidence.queries.dtype)
    return dataclasses.replace(
        evidence,
        queries=jnp.where(is_new[:, :, None, None], new, evidence.queries),
        query_positions=jnp.where(is_new, newest, evidence.query_positions),
    )


def last_queries(evidence: Evidence) -> tuple[Float[Array, "B w N D"], Int[Array, "B w"]]:
    """The ring, oldest first, in float32, and its positions."""
    size = evidence.queries.shape[1]
    last = jnp.max(evidence.query_positions, axis=1, keepdims=True)
    slots = (last + 1 + jnp.arange(size, dtype=jnp.int32)[None]) % size
    queries = jnp.take_along_axis(evidence.queries, slots[:, :, None, None], axis=1)
    return queries.astype(jnp.float32), jnp.take_along_axis(evidence.query_positions, slots, axis=1)


def _update(moments: QueryMoments, queries: axes.Queries, positions: axes.Positions, shape: ModelShape) -> QueryMoments:
    """Running means with these queries counted in; the sinks' own queries are left out, as they look at themselves."""
    plain = unrotate(queries.astype(jnp.float32), turns_at(shape.rope, positions))  # B T N D
    valid = (positions >= SINKS_NOT_HEARD).astype(jnp.float32)
    new = jnp.sum(valid, axis=1)
    count = moments.count + new
    share = new / jnp.maximum(count, 1.0)
    masked = jnp.where(valid[:, :, None, None] > 0, plain, 0.0)
    mean = jnp.sum(masked, axis=1) / jnp.maximum(new, 1.0)[:, None, None]
    rows = jnp.moveaxis(masked, 1, 2)  # B N T D
    second = jnp.einsum("BNTD,BNTR->BNDR", rows, rows) / jnp.maximum(new, 1.0)[:, None, None, None]
    return QueryMoments(
        count=count,
        mean=moments.mean + (mean - moments.mean) * share[:, None, None],
        second=moments.second + (second - moments.second) * share[:, None, None, None],
    )


SINKS_NOT_HEARD = 4
"""Queries before this position are not counted in moments (arXiv 2510.00636, its code)."""


def begin(
    numbers: dict[str, jax.Array], slots: Int[Array, "B T"], new: dict[str, jax.Array | None]
) -> dict[str, jax.Array]:
    """Numbers of the exact segment where new tokens were written: zeros, or what is given for them.

    Args:
      numbers: name -> `B K S`.
      slots: of the new tokens; S, which lies outside, for padding.
      new: name -> `B T K`, or None for zeros.
    """
    rows = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]

    def write(name: str, array: jax.Array) -> jax.Array:
        given = new[name]
        return array.at[rows, :, slots].set(0.0 if given is None else given, mode="drop")

    return {name: write(name, array) for name, array in numbers.items()}


def strength(values: axes.NewValues, output: Float[Array, "N D M"], *, block: int = 64) -> Float[Array, "B T K"]:
    """Sum of magnitudes of what the output projection makes of each value, mean over the query heads that share it."""
    batch, num_tokens, num_kv_heads, size = values.shape
    weights = output.astype(jnp.float32).reshape(num_kv_heads, -1, size, output.shape[2])  # K G D M
    padding = -num_tokens % block if num_tokens > block else 0
    padded = jnp.pad(values.astype(jnp.float32), ((0, 0), (0, padding), (0, 0), (0, 0)))

    def some(values: jax.Array) -> jax.Array:
        made = jnp.einsum("BTKD,KGDM->BTKGM", values, weights)
        return jnp.mean(jnp.sum(jnp.abs(made), axis=-1), axis=-1)

    if not padding and num_tokens <= block:
        return some(padded)
    blocks = jnp.moveaxis(padded.reshape(batch, -1, block, num_kv_heads, size), 1, 0)
    return jnp.moveaxis(jax.lax.map(some, blocks), 0, 1).reshape(batch, -1, num_kv_heads)[:, :num_tokens]
