"""The public function of the operation, and the choice of its implementation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, unspread
from kernels_pallas.decode_attention import mosaic_tpu, reference, triton_gpu, triton_mass
from kernels_pallas.decode_attention.reference import MASSES, Attended, Running, Segment


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What runs on a kind of device.

    Attributes:
      unsupported: why attention over a segment cannot be served on a device; None if it can.
      walk: attention over a segment, see `reference.walk`.
      mass: of a segment that is served, see `reference.mass_of`.
      mass_unsupported: why this is left to the reference; None if it is not.
    """

    unsupported: Callable[[Segment, str], str | None]
    walk: Callable[..., Running]
    mass: Callable[..., jax.Array]
    mass_unsupported: Callable[[Segment], str | None]


_ROWS_OF_TURN = 128
"""Queries of a stored head whose masses are found together."""

_KERNELS = {
    "mosaic_tpu": _Kernel(mosaic_tpu.unsupported, mosaic_tpu.walk, mosaic_tpu.mass, mosaic_tpu.mass_unsupported),
    "triton_gpu": _Kernel(triton_gpu.unsupported, triton_gpu.walk, triton_mass.mass, triton_mass.unsupported),
}

IMPLEMENTATIONS = (*_KERNELS, "reference")
"""Best first."""


def decode_attention(
    segments: tuple[Segment, ...],
    *,
    query_positions: Int[Array, "B T"],
    scale: float,
    mass: str | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Attended, ...]:
    """Softmax attention of T query tokens over the slots that each may see, one softmax over all segments.

        weight[t, n, s] = softmax_s(scale (q[t, n] . k[s] + bias[t, n]))    over the slots of all segments
        output[t, n]    = sum_s weight[t, n, s] v[s]                        over the slots of one

    A query at position p sees the slots whose position is between 0 and p; a query at position -1 (padding) sees
    nothing and gets zeros. What lies in a slot that no query sees cannot matter, NaN included.

    Args:
      segments: at least one.
      query_positions: `B T` int32; -1 is padding.
      scale: of the scores, D**-0.5.
      mass: one of `MASSES`, what the weights of each slot come to; None leaves it out, and it costs nothing.
      implementation: a name of `IMPLEMENTATIONS`; None chooses the best for each segment.
      mesh: over which the arrays lie: axis "data" has sequences, "model" heads, each where it divides them. None for
        the device that JAX runs on.

    Returns:
      Output and weight of each segment, and the mass of its slots if asked for, accumulated in float32.

    Raises:
      ValueError: the implementation or the mass is unknown, or the implementation cannot serve a segment.
    """
    if mass not in (None, *MASSES):
        raise ValueError(f"decode_attention gives no mass '{mass}': ask for one of {', '.join(MASSES)}.")
    given = {"implementation": implementation, "mesh": mesh}
    known = {"reference": (reference.walk, reference.mass_of)}
    for name, kernel in _KERNELS.items():
        known[name] = functools.partial(kernel.walk, mesh=mesh), functools.partial(kernel.mass, mesh=mesh)
    walks = tuple(known[choose(segment, **given).name][0] for segment in segments)
    masses = tuple(known[choose(segment, mass=True, **given).name][1] for segment in segments)
    with jax.named_scope("decode_attention"):
        return reference.decode_attention(
            segments, query_positions=query_positions, scale=scale, mass=mass, walks=walks, masses=masses
        )


def attention_mass(
    segments: tuple[Segment, ...],
    *,
    query_positions: Int[Array, "B T"],
    scale: float,
    mass: str = "sum",
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B K S"], ...]:
    """The masses of `decode_attention` without its outputs: keys are read twice, values not at all.

    A softmax wants the sum of a query's weights before those of several can be added. Written out after one reading,
    they would take more room than what is read.

    Args:
      segments: at least one; their values may be none.
      query_positions: `B T` int32; -1 is padding. Where a kernel runs, many tokens go in turns, as many as it takes.
      scale: of the scores.
      mass: one of `MASSES`.
      implementation: as for `decode_attention`.
      mesh: as for `decode_attention`.

    Returns:
      Of each segment's slots, what the T weights come to; `B 1 S` in a pool.

    Raises:
      ValueError: as for `decode_attention`.
    """
    segments = tuple(dataclasses.replace(segment, values=()) for segment in segments)
    given = {"implementation": implementation, "mesh": mesh}

    def of(segments: tuple[Segment, ...], positions: jax.Array) -> tuple[jax.Array, ...]:
        attended = decode_attention(segments, query_positions=positions, scale=scale, mass=mass, **given)
        return tuple(one.mass for one in attended)

    tokens, heads = query_positions.shape[1], min(part.num_heads for segment in segments for part in segment.keys)
    turn = max(_ROWS_OF_TURN * heads // segments[0].queries.shape[2], 1)
    some = _tokens_of(segments, 0, min(turn, tokens))
    if turn >= tokens or all(choose(segment, **given).name == "reference" for segment in some):
        return of(segments, query_positions)
    padding = [(0, 0), (0, -tokens % turn)]
    query_positions = jnp.pad(query_positions, padding, constant_values=-1)
    pad = lambda array: jnp.pad(array, padding + [(0, 0)] * (array.ndim - 2))  # noqa: E731
    segments = tuple(_with_queries(segment, pad) for segment in segments)
    join = jnp.maximum if mass == "peak" else jnp.add

    def add(index: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        positions = jax.lax.dynamic_slice_in_dim(query_positions, index * turn, turn, axis=1)
        return tuple(map(join, found, of(_tokens_of(segments, index * turn, turn), positions)))

    shapes = jax.eval_shape(lambda: of(some, query_positions[:, :turn]))
    zeros = tuple(jnp.zeros(one.shape, one.dtype) for one in shapes)
    return jax.lax.fori_loop(0, query_positions.shape[1] // turn, add, zeros)


def _with_queries(segment: Segment, function: Callable[[jax.Array], jax.Array]) -> Segment:
    """A segment with its queries, and what is added to their products, made others `B T ...`."""
    bias = None if segment.bias is None else function(segment.bias)
    return dataclasses.replace(segment, queries=function(segment.queries), bias=bias)


def _tokens_of(segments: tuple[Segment, ...], start: jax.Array | int, count: int) -> tuple[Segment, ...]:
    """Segments with some of the query tokens."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=count, axis=1)
    return tuple(_with_queries(segment, cut) for segment in segments)


def choose(
    segment: Segment, *, mass: bool = False, implementation: str | None = None, mesh: Mesh | None = None
) -> Choice:
    """What attends to a segment, or finds the masses of its slots: a question of shapes, dtypes and devices alone.

    Args:
      segment: arrays, or their shapes.
      mass: whether masses are meant; they are found by what attends to the segment, or else by the reference.
      implementation: the only one that may, or None.
      mesh: as for `decode_attention`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the segment.
    """
    spread = unspread(mesh, implementation)
    return choose_for(segment, device_kind(mesh), mass=mass, implementation=implementation, spread=spread)


def choose_for(
    segment: Segment,
    device: str,
    *,
    mass: bool = False,
    implementation: str | None = None,
    spread: str | None = None,
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      segment: arrays, or their shapes.
      device: the kind.
      mass: as for `choose`.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    unsupported = {name: kernel.unsupported(segment, device) or spread for name, kernel in _KERNELS.items()}
    chosen = _dispatch.choose("decode_attention", {**unsupported, "reference": None}, implementation=implementation)
    if not mass or chosen.name not in _KERNELS:
        return chosen
    of_mass = {chosen.name: _KERNELS[chosen.name].mass_unsupported(segment), "reference": None}
    return _dispatch.choose("attention mass", of_mass)
