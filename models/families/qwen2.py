"""Qwen2 and Qwen2.5: a Llama with biases on queries, keys and values (DeepSeek-R1-Distill-Qwen among them)."""

from typing import Any

from models.config import FAMILIES, Family


def _size(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, heads: tuple[int, int], **other: Any
) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        **other,
    }


FAMILIES.register(
    "qwen2",
    Family(
        fixed={"qkv_bias": True},
        assumed={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        reads={"sliding_window": ("sliding_window",)},
        ignores=("attention_bias", "max_window_layers"),
        sizes={
            "qwen2.5-0.5b": _size(896, 4864, 24, (14, 2), vocab_size=151936, tie_word_embeddings=True),
            "qwen2.5-1.5b": _size(1536, 8960, 28, (12, 2), vocab_size=151936, tie_word_embeddings=True),
            "qwen2.5-3b": _size(2048, 11008, 36, (16, 2), vocab_size=151936, tie_word_embeddings=True),
            "qwen2.5-7b": _size(3584, 18944, 28, (28, 4), vocab_size=152064),
            "qwen2.5-14b": _size(5120, 13824, 48, (40, 8), vocab_size=152064),
            "qwen2.5-32b": _size(5120, 27648, 64, (40, 8), vocab_size=152064),
            "deepseek-r1-distill-qwen-1.5b": _size(
                1536, 8960, 28, (12, 2), vocab_size=151936, rope_theta=1e4, max_position_embeddings=131072
            ),
            "deepseek-r1-distill-qwen-7b": _size(
                3584, 18944, 28, (28, 4), vocab_size=152064, rope_theta=1e4, max_position_embeddings=131072
            ),
        },
    ),
)
