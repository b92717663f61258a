"""The public function of the operation, and the choice of its implementation."""

import functools

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from kernels_pallas import _dispatch
from kernels_pallas._dispatch import Choice, device_kind, unspread
from kernels_pallas.decode_attention import mosaic_tpu, reference, triton_gpu
from kernels_pallas.decode_attention.reference import MASSES, Attended, Segment

IMPLEMENTATIONS = ("mosaic_tpu", "triton_gpu", "reference")
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
    chosen = [choose(segment, implementation=implementation, mesh=mesh).name for segment in segments]
    known = {
        "mosaic_tpu": functools.partial(mosaic_tpu.walk, mesh=mesh),
        "triton_gpu": functools.partial(triton_gpu.walk, mesh=mesh),
        "reference": reference.walk,
    }
    walks = tuple(known[name] for name in chosen)
    by_kernel = [
        name == "mosaic_tpu" and mosaic_tpu.mass_unsupported(segment) is None
        for name, segment in zip(chosen, segments, strict=True)
    ]
    of_kernel = functools.partial(mosaic_tpu.mass, mesh=mesh)
    masses = tuple(of_kernel if kernel else reference.mass_of for kernel in by_kernel)
    with jax.named_scope("decode_attention"):
        return reference.decode_attention(
            segments, query_positions=query_positions, scale=scale, mass=mass, walks=walks, masses=masses
        )


def choose(segment: Segment, *, implementation: str | None = None, mesh: Mesh | None = None) -> Choice:
    """What runs a segment: a question of shapes, dtypes and devices alone.

    Args:
      segment: arrays, or their shapes.
      implementation: the only one that may, or None.
      mesh: as for `decode_attention`.

    Raises:
      ValueError: the implementation is unknown, or cannot serve the segment.
    """
    spread = unspread(mesh, implementation)
    return choose_for(segment, device_kind(mesh), implementation=implementation, spread=spread)


def choose_for(
    segment: Segment, device: str, *, implementation: str | None = None, spread: str | None = None
) -> Choice:
    """The same for a kind of device that may not be there, e.g. "TPU v6 lite".

    Args:
      segment: arrays, or their shapes.
      device: the kind.
      implementation: the only one that may, or None.
      spread: why kernels are out of the question wherever arrays lie, or None.
    """
    unsupported = {
        "mosaic_tpu": mosaic_tpu.unsupported(segment, device) or spread,
        "triton_gpu": triton_gpu.unsupported(segment, device) or spread,
        "reference": None,
    }
    return _dispatch.choose("decode_attention", unsupported, implementation=implementation)
