"""The decoder: embedding, layers of attention and feed-forward with RMS norms before each, output head.

One class serves Llama 2 to 3.2, Mistral, Qwen2, Qwen2.5 and Qwen3; `ModelConfig` holds what differs. The model knows
nothing of policies or of decoding: it hands each layer's cache to attention and collects what comes back.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvjax import axes
from kvjax.model_shape import ModelShape
from kvjax.rope import Turns, turns_at
from kvjax.sharding import Placement
from models.config import ModelConfig
from models.layers import PHASES, Attention, Build, FeedForward, LayerState, RMSNorm


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, build: Build):
        self.attention_norm = RMSNorm(config.width, axis="M", epsilon=config.norm_epsilon, build=build)
        self.attention = Attention(config, build)
        self.feed_forward_norm = RMSNorm(config.width, axis="M", epsilon=config.norm_epsilon, build=build)
        self.feed_forward = FeedForward(config, build)

    def __call__(
        self,
        inputs: axes.Activations,
        *,
        turns: Turns,
        positions: axes.Positions,
        layer: LayerState | None,
        phase: str,
    ) -> tuple[axes.Activations, LayerState | None]:
        """One layer; returns activations and the layer's cache."""
        with jax.named_scope("attention"):
            attended, layer = self.attention(
                self.attention_norm(inputs), turns=turns, positions=positions, layer=layer, attend=PHASES[phase]
            )
        middle = inputs + attended
        with jax.named_scope("feed_forward"):
            return middle + self.feed_forward(self.feed_forward_norm(middle)), layer


class Transformer(nnx.Module):
    """A decoder-only language model, a pytree of parameters; `params` of the decoding functions.

    Attributes:
      config: dimensions and switches (static).
      placement: where parameters, caches and activations live (static).
      cache_shape: the facts that a cache needs (static).
    """

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype | str = "float32", placement: Placement = Placement()):
        """Makes the model with all projections zero; `models.load_model` and `models.initialise` fill it."""
        build = Build(placement=placement, dtype=jnp.dtype(dtype))
        self.config = config
        self.placement = placement
        self.cache_shape: ModelShape = config.cache_shape(jnp.dtype(dtype).name)
        self.embedding = build.parameter("V M", (config.vocab_size, config.width))
        self.layers = nnx.List([Layer(config, build) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.width, axis="M", epsilon=config.norm_epsilon, build=build)
        self.head = None if config.tied_embeddings else build.parameter("M V", (config.width, config.vocab_size))

    def __call__(
        self,
        tokens: axes.Tokens,
        *,
        positions: axes.Positions,
        layers: tuple[LayerState, ...] | None = None,
        phase: str = "train",
    ) -> tuple[axes.Activations, tuple[LayerState, ...] | None]:
        """Runs the layers over new tokens.

        Args:
          tokens: `B T` int32. An id outside the vocabulary gives NaN.
          positions: `B T` int32, absolute; -1 is padding.
          layers: the cache's layers; None without a cache.
          phase: "train" (no cache), "prefill" (fills an empty cache), "replay" (reads a prompt again that is not stored
            yet), "decode" (appends to a cache), "calibrate" (`layers` gather statistics instead of caches) or "foresee"
            (`layers` learn what their tokens will be worth).

        Returns:
          The last layer's activations `B T M`, normed and ready for `logits`, and the cache's layers.
        """
        known = jnp.where(tokens >= 0, tokens, self.config.vocab_size)  # a negative index would count from the end
        hidden = jnp.take(self.embedding[...], known, axis=0, mode="fill")  # B T M
        hidden = self.placement.constrain(hidden, "B T M")
        turns = turns_at(self.config.rope, positions)
        updated = []
        for index, block in enumerate(self.layers):
            layer = None if layers is None else layers[index]
            hidden, layer = block(hidden, turns=turns, positions=positions, layer=layer, phase=phase)
            hidden = self.placement.constrain(hidden, "B T M")
            updated.append(layer)
        return self.norm(hidden), None if layers is None else tuple(updated)

    def logits(self, hidden: Float[Array, "B T M"]) -> axes.Logits:
        """Scores of the next token, `B T V` in float32."""
        with jax.named_scope("head"):
            if self.head is None:
                scores = jnp.einsum("BTM,VM->BTV", hidden, self.embedding[...], preferred_element_type=jnp.float32)
            else:
                scores = jnp.einsum("BTM,MV->BTV", hidden, self.head[...], preferred_element_type=jnp.float32)
        return self.placement.constrain(scores, "B T V")
