"""What a decoder of the Llama kind is made of, and the registry of the families that say so."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from kvjax.model_shape import ModelShape
from kvjax.registry import Registry
from kvjax.rope import Rope

DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model's dimensions and switches.

    Attributes:
      model_type: the family, as Hugging Face names it ("llama", "qwen3", ...).
      vocab_size: V, rows of the embedding.
      width: M.
      feed_forward: F.
      num_layers: L.
      num_query_heads: N.
      num_kv_heads: K, a divisor of N: N for multi-head, 1 for multi-query attention.
      head_size: D; need not be M / N.
      rope: rotation of queries and keys.
      norm_epsilon: added to the mean square in every RMS norm.
      qkv_bias: whether the query, key and value projections have biases.
      output_bias: whether the output projection has one.
      mlp_bias: whether the feed-forward projections have them.
      qk_norm: whether queries and keys pass an RMS norm per head before rotation.
      tied_embeddings: whether the output head is the embedding.
      max_positions: tokens of context that the checkpoint is made for.
      sliding_window: tokens that a query sees at most where layers are so limited; None for all.
      dtype: dtype in which the checkpoint is stored, e.g. "bfloat16".
    """

    model_type: str
    vocab_size: int
    width: int
    feed_forward: int
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    rope: Rope
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    max_positions: int = 2048
    sliding_window: int | None = None
    dtype: str = "bfloat16"

    def cache_shape(self, dtype: str) -> ModelShape:
        """The facts that caches and decoding need, for keys and values of the given dtype."""
        return ModelShape(
            num_layers=self.num_layers,
            num_query_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=dtype,
            vocab_size=self.vocab_size,
            sliding_window=self.sliding_window,
            rope=self.rope,
            fingerprint=self.fingerprint(),
        )

    def fingerprint(self) -> str:
        """A hash of everything that decides what the layers compute, the dtype apart."""
        facts = dataclasses.asdict(dataclasses.replace(self, dtype="", max_positions=0))
        return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]

    def num_parameters(self) -> int:
        """Parameters of the model, biases and norms included."""
        query, kv = self.num_query_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = 2 * self.width * (query + kv)
        attention += (
            self.qkv_bias * (query + 2 * kv) + self.output_bias * self.width + self.qk_norm * 2 * self.head_size
        )
        mlp = 3 * self.width * self.feed_forward + self.mlp_bias * (2 * self.feed_forward + self.width)
        embeddings = self.vocab_size * self.width * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attention + mlp + 2 * self.width) + self.width + embeddings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What one family says differently from the common decoder.

    Attributes:
      fixed: fields of `ModelConfig` that hold for the whole family, whatever the file says.
      assumed: values that transformers assumes for keys which a `config.json` of the family leaves out.
      reads: further keys of its `config.json` and the fields of `ModelConfig` that each sets.
      ignores: further keys of its `config.json` that cannot change the model's output.
      sizes: published sizes by name, as a `config.json` would give them.
    """

    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    assumed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    sizes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


FAMILIES: Registry[Family] = Registry("model type", package="models.families")
