"""What the splits of a head's slots found, put together on an NVIDIA GPU by one kernel: XLA takes three.

    largest = max_s maximum[s],   output = sum_s output[s] 2^(maximum[s] - largest),   weights alike

A program has a few channels of a few rows of queries, of all splits at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from kernels_pallas._gpu import power

_ROWS = 8  # of queries in a program
_MOST_NUMBERS = 8192  # in a program, of the outputs of all splits
_WARPS = 4

Merged = tuple[Float[Array, "heads Q R"], Float[Array, "heads Q"], Float[Array, "heads Q"]]


def merge(
    output: Float[Array, "heads splits R Q"],
    maximum: Float[Array, "heads splits Q"],
    total: Float[Array, "heads splits Q"],
    *,
    interpret: Any,
) -> Merged:
    """Output, maximum and sum of weights of all splits.

    Args:
      output: R a multiple of 16, Q of 8.
      maximum: in units of ln 2.
      total: sums of weights.
      interpret: see `pl.pallas_call`.
    """
    heads, splits, width, rows = output.shape
    channels = max(min(16, _MOST_NUMBERS // (power(splits) * _ROWS)), 1)
    wide = jax.ShapeDtypeStruct((heads, rows, width), jnp.float32)
    flat = jax.ShapeDtypeStruct((heads, rows), jnp.float32)
    of_splits = pl.BlockSpec((None, splits, _ROWS), lambda head, row, channel: (head, 0, row))
    of_head = pl.BlockSpec((None, _ROWS), lambda head, row, channel: (head, row))
    return pl.pallas_call(
        _kernel,
        grid=(heads, rows // _ROWS, width // channels),
        in_specs=[
            pl.BlockSpec((None, splits, channels, _ROWS), lambda head, row, channel: (head, 0, channel, row)),
            of_splits,
            of_splits,
        ],
        out_specs=[
            pl.BlockSpec((None, _ROWS, channels), lambda head, row, channel: (head, row, channel)),
            of_head,
            of_head,
        ],
        out_shape=[wide, flat, flat],
        compiler_params=pltriton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="merge_attention",
    )(output, maximum, total)


def _kernel(
    output: jax.Ref, maximum: jax.Ref, total: jax.Ref, merged: jax.Ref, largest: jax.Ref, weights: jax.Ref
) -> None:
    """Some channels of some rows; all programs of these rows write the same maxima and sums."""
    splits = output.shape[0]
    split = jnp.arange(power(splits), dtype=jnp.int32)
    there, where = (split < splits)[:, None], jnp.minimum(split, splits - 1)
    found = maximum[where, :]
    most = jnp.max(found, axis=0)  # a last split that is there twice does not change it
    decay = jnp.where(there, jnp.exp2(found - most[None, :]), 0.0)  # splits Q
    sums = jnp.sum(output[where, :, :] * decay[:, None, :], axis=0)
    merged[...] = sums.T
    largest[...] = most
    weights[...] = jnp.sum(total[where, :] * decay, axis=0)
