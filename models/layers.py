"""The parts of a decoder layer: norm, projection with optional bias, attention block, feed-forward block."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax import axes
from kvjax.attention import decode_layer, observe_layer, prefill_layer, replay_layer
from kvjax.cache import LayerCache
from kvjax.causal import causal_attention
from kvjax.foresight import LayerFuture, foresee_layer
from kvjax.rope import Turns, rotate
from kvjax.sharding import Placement
from kvjax.statistics import LayerStatistics
from models.config import ModelConfig

LayerState = LayerCache | LayerStatistics | LayerFuture
"""What a layer carries from call to call: its cache, or what it gathers in calibration or foresight."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
    """How parameters are made.

    Attributes:
      placement: where they live.
      dtype: their dtype, and that of all activations.
    """

    placement: Placement
    dtype: jnp.dtype

    def parameter(self, axis_names: str, shape: tuple[int, ...], *, value: float = 0.0) -> nnx.Param:
        """A parameter with named axes, filled with one value."""
        filled = jnp.full(shape, value, self.dtype)
        return nnx.Param(self.placement.constrain(filled, axis_names), axes=axis_names)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x**2) + epsilon) * scale over the last axis, in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, *, axis: str, epsilon: float, build: Build):
        self.scale = build.parameter(axis, (size,), value=1.0)
        self.epsilon = epsilon

    def __call__(self, inputs: Float[Array, "..."]) -> Float[Array, "..."]:
        """Norms the last axis."""
        wide = inputs.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(inputs.dtype)
        scale = self.scale[...]
        return normed * scale.reshape((1,) * (inputs.ndim - 1) + scale.shape)


class Projection(nnx.Module):
    """A linear map between named axes, e.g. "M N D": from M to heads; the bias has the outgoing axes."""

    def __init__(self, axis_names: str, shape: tuple[int, ...], *, num_inputs: int, bias: bool, build: Build):
        outgoing = " ".join(axis_names.split()[num_inputs:])
        self.kernel = build.parameter(axis_names, shape)
        self.bias = build.parameter(outgoing, shape[num_inputs:]) if bias else None
        self.num_inputs = num_inputs
        self.placement = build.placement

    def __call__(self, inputs: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        """Maps the axes after `B T`."""
        kernel = self.kernel[...]
        out_shape = kernel.shape[self.num_inputs :]
        # One product of matrices: XLA's CPU backend takes twice as long for the gradient of the unflattened one.
        rows = inputs.reshape(-1, math.prod(kernel.shape[: self.num_inputs]))
        count = rows.shape[0]
        if count == 1 and self.placement.device_kind.startswith("NVIDIA"):
            # A vector times a matrix of up to 2,048 columns XLA writes out, product by product, before it adds them up;
            # with a second row it even makes one product of those that share their rows.
            rows = jnp.broadcast_to(rows, (2, rows.shape[1]))
        outputs = (rows @ kernel.reshape(rows.shape[1], -1))[:count].reshape(*inputs.shape[:2], *out_shape)
        return outputs if self.bias is None else outputs + self.bias[...][None, None]


class Attention(nnx.Module):
    """Projections and rotation around attention, which knows the cache and its policy; this module does not."""

    def __init__(self, config: ModelConfig, build: Build):
        width, size = config.width, config.head_size
        query_shape, kv_shape = (width, config.num_query_heads, size), (width, config.num_kv_heads, size)
        self.query = Projection("M N D", query_shape, num_inputs=1, bias=config.qkv_bias, build=build)
        self.key = Projection("M K D", kv_shape, num_inputs=1, bias=config.qkv_bias, build=build)
        self.value = Projection("M K D", kv_shape, num_inputs=1, bias=config.qkv_bias, build=build)
        self.output = Projection(
            "N D M", (config.num_query_heads, size, width), num_inputs=2, bias=config.output_bias, build=build
        )

        def head_norm() -> RMSNorm | None:
            return RMSNorm(size, axis="D", epsilon=config.norm_epsilon, build=build) if config.qk_norm else None

        self.query_norm, self.key_norm = head_norm(), head_norm()
        self.placement = build.placement

    def __call__(
        self,
        inputs: axes.Activations,
        *,
        turns: Turns,
        positions: axes.Positions,
        layer: LayerState | None,
        attend: Callable,
    ) -> tuple[axes.Activations, LayerState | None]:
        """Attends; returns the block's output and the layer's cache with the new tokens in it."""
        queries, keys, values = self.query(inputs), self.key(inputs), self.value(inputs)
        if self.query_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries = self.placement.constrain(rotate(queries, turns), "B T N D")
        keys = self.placement.constrain(rotate(keys, turns), "B T K D")
        values = self.placement.constrain(values, "B T K D")
        kernel = self.output.kernel[...]
        attended, layer = attend(
            layer, queries, keys=keys, values=values, positions=positions, output=kernel, placement=self.placement
        )
        return self.output(attended), layer


def attend_without_cache(
    layer: None,
    queries: axes.Queries,
    *,
    keys: axes.NewKeys,
    values: axes.NewValues,
    positions: axes.Positions,
    output: Float[Array, "N D M"],
    placement: Placement,
) -> tuple[axes.Queries, None]:
    """A plain causal pass, for training and for comparison."""
    del output, placement
    return causal_attention(queries, keys, values=values, positions=positions), layer


PHASES: dict[str, Callable] = {
    "train": attend_without_cache,
    "prefill": prefill_layer,
    "replay": replay_layer,
    "decode": decode_layer,
    "calibrate": observe_layer,
    "foresee": foresee_layer,
}
"""How attention treats the cache: not at all; as an empty one that the prompt fills; as a prompt that is read again; as
one to append to; as statistics that gather what passes; as what queries to come will attend to."""


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, build: Build):
        wide, bias = (config.width, config.feed_forward), config.mlp_bias
        self.gate = Projection("M F", wide, num_inputs=1, bias=bias, build=build)
        self.up = Projection("M F", wide, num_inputs=1, bias=bias, build=build)
        self.down = Projection("F M", wide[::-1], num_inputs=1, bias=bias, build=build)

    def __call__(self, inputs: axes.Activations) -> axes.Activations:
        """Maps M to M."""
        return self.down(jax.nn.silu(self.gate(inputs)) * self.up(inputs))
