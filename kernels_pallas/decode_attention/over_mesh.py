"""A kernel over the devices of a mesh: each runs it on the sequences and heads that it has."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas._dispatch import on_each_device, spread
from kernels_pallas.decode_attention.reference import Segment

_ARRAYS = ("queries", "keys", "values", "positions", "bias", "owners", "pages")


def over_mesh(
    function: Callable[..., Any],
    segment: Segment,
    query_positions: Int[Array, "B T"],
    mesh: Mesh | None,
    *extra: Float[Array, "B N T"],
) -> Any:
    """What a function of one device's arrays gives for all.

    Args:
      function: of a segment, its query positions and `extra`; gives arrays `B N ...` or `B K ...`.
      segment: the arrays.
      query_positions: `B T` int32.
      extra: what else belongs to queries.
      mesh: axis "data" has sequences, "model" heads, each where it divides them; None or one device: all are here.
    """
    batch, heads = spread(mesh, query_positions.shape[0], segment.keys[0].num_heads)
    parts = 1 if heads is None else mesh.shape[heads]

    def on_one(arrays: dict[str, Any], query_positions: jax.Array, *extra: jax.Array) -> Any:
        num_kv_heads = segment.num_kv_heads and segment.num_kv_heads // parts
        return function(dataclasses.replace(segment, **arrays, num_kv_heads=num_kv_heads), query_positions, *extra)

    def of_head(array: jax.Array) -> PartitionSpec:
        return PartitionSpec(batch, heads if array.shape[1] > 1 else None)

    arrays = {name: getattr(segment, name) for name in _ARRAYS}
    of_query = PartitionSpec(batch, None, heads)
    specs = {name: jax.tree.map(of_head, array) for name, array in arrays.items()}
    specs |= {"queries": of_query, "bias": jax.tree.map(lambda _: of_query, segment.bias)}
    of_row = PartitionSpec(batch, heads)
    in_specs = (specs, PartitionSpec(batch), *(of_row for _ in extra))
    return on_each_device(on_one, (arrays, query_positions, *extra), mesh=mesh, in_specs=in_specs, out_specs=of_row)
