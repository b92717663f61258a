"""What all kernels for TPUs share."""

import jax
import jax.numpy as jnp

LANES = 128
ROWS = 8
"""Sublanes of a float32 tile: rows come in multiples."""
MASKED = -1e30
"""The score of what is not seen; finite, so that a row which sees nothing gives exp(0) * 0 and not NaN."""
VMEM = 48 * 2**20
"""Bytes that a kernel may take, of the 64 MiB that a core has at least."""


LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu reads of the environment before it compiles on a machine without chips."""


def not_a_tpu(device: str) -> str | None:
    """Why a kernel for TPUs is not chosen on a kind of device; None if it has been compiled for it."""
    if not device.startswith("TPU"):
        return f"it runs on TPUs, and this is {device}"
    return None if device.startswith(("TPU v5", "TPU v6", "TPU7")) else f"it has not been compiled for {device}"


def beside(arrays: list[jax.Array], axis: int) -> jax.Array:
    """Arrays one after the other along an axis; one alone as it is."""
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis=axis)


def picked(array: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """`jnp.take_along_axis` of a matrix, with indices of as many bits as its numbers: newer JAX makes those int32."""
    other = (1 - axis,)
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
        operand_batching_dims=other,
        start_indices_batching_dims=other,
    )
    inside = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(array, index[..., None], numbers, slice_sizes=(1, 1), mode=inside)


def in_each_byte(byte: int) -> int:
    """A byte four times, as a signed word."""
    word = byte * 0x01010101
    return word - (1 << 32) if word >= 1 << 31 else word


def of_half(shifted: jax.Array) -> jax.Array:
    """Float16 numbers, not negative, from their bits, 13 places up, where a float32 has them; subnormals included."""
    normal = jax.lax.bitcast_convert_type(shifted + (112 << 23), jnp.float32)
    subnormal = jax.lax.bitcast_convert_type(shifted + (113 << 23), jnp.float32) - 2.0**-14
    return jnp.where(shifted < 1 << 23, subnormal, normal)
