"""A kernel over the devices of a mesh: each runs it on the sequences and heads that it has."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from kernels_pallas._dispatch import on_each_device, spread
from kernels_pallas.decode_attention.reference import Running, Segment


def over_mesh(
    function: Callable[..., Running], segment: Segment, query_positions: Int[Array, "B T"], mesh: Mesh | None
) -> Running:
    """What a function of one device's arrays gives for all.

    Args:
      function: of queries, keys, values, positions, bias and query positions; keys and values are one part each.
      segment: the arrays.
      query_positions: `B T` int32.
      mesh: axis "data" has sequences, "model" heads, each where it divides them; None or one device: all are here.
    """
    arrays = segment.queries, segment.keys[0], segment.values[0], segment.positions, segment.bias, query_positions
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    batch, heads = spread(mesh, query_positions.shape[0], segment.keys[0].num_heads)

    def of_head(array: jax.Array) -> PartitionSpec:
        return PartitionSpec(batch, heads if array.shape[1] > 1 else None)

    of_query = PartitionSpec(batch, None, heads)
    parts = (jax.tree.map(of_head, part) for part in arrays[1:3])
    bias = None if segment.bias is None else of_query
    in_specs = (of_query, *parts, of_head(segment.positions), bias, PartitionSpec(batch))
    out_specs = (PartitionSpec(batch, heads),) * 3
    return on_each_device(function, arrays, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
