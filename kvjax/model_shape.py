"""What caches, codecs and decoding need to know of a model."""

import dataclasses

from kvjax.rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Facts of a model, static and hashable.

    Attributes:
      num_layers: L.
      num_query_heads: N.
      num_kv_heads: K, a divisor of N.
      head_size: D.
      dtype: name of the dtype of keys and values, e.g. "bfloat16".
      vocab_size: V, one past the largest token id.
      sliding_window: tokens that a query sees at most, None for all.
      rope: how keys are rotated; None leaves it unknown, which only codecs that store keys from before RoPE mind.
      fingerprint: hash of the model's whole config, by which statistics know their model.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_size: int
    dtype: str
    vocab_size: int
    sliding_window: int | None = None
    rope: Rope | None = None
    fingerprint: str = ""
