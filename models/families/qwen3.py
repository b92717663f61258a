"""Qwen3: RMS norms on queries and keys, and a head size of its own, apart from width over heads."""

from models.config import FAMILIES, Family


def _size(hidden_size: int, intermediate_size: int, num_hidden_layers: int, heads: int, *, tied: bool) -> dict:
    return {
        "vocab_size": 151936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


FAMILIES.register(
    "qwen3",
    Family(
        fixed={"qk_norm": True},
        assumed={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        reads={"attention_bias": ("qkv_bias", "output_bias"), "sliding_window": ("sliding_window",)},
        ignores=("max_window_layers",),
        sizes={
            "qwen3-0.6b": _size(1024, 3072, 28, 16, tied=True),
            "qwen3-1.7b": _size(2048, 6144, 28, 16, tied=True),
            "qwen3-4b": _size(2560, 9728, 36, 32, tied=True),
            "qwen3-8b": _size(4096, 12288, 36, 32, tied=False),
            "qwen3-14b": _size(5120, 17408, 40, 40, tied=False),
            "qwen3-32b": _size(5120, 25600, 64, 64, tied=False),
        },
    ),
)
