"""Llama 2, 3, 3.1 and 3.2, and what shares their shape (DeepSeek-R1-Distill-Llama among them)."""

from typing import Any

from models.config import FAMILIES, Family

_LLAMA_3 = {
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
}
_SCALED_BY_8 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_SCALED_BY_32 = {
    "max_position_embeddings": 131072,
    "rope_scaling": {**_SCALED_BY_8["rope_scaling"], "factor": 32.0},
    "tie_word_embeddings": True,
}


def _size(
    hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, **other: Any
) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        **other,
    }


FAMILIES.register(
    "llama",
    Family(
        assumed={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        reads={"attention_bias": ("qkv_bias", "output_bias"), "mlp_bias": ("mlp_bias",)},
        sizes={
            "llama-2-7b": _size(4096, 11008, 32, 32, vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=4096),
            "llama-2-13b": _size(
                5120, 13824, 40, 40, vocab_size=32000, rms_norm_eps=1e-5, max_position_embeddings=4096
            ),
            "llama-3-8b": _size(4096, 14336, 32, 32, **_LLAMA_3, max_position_embeddings=8192),
            "llama-3.1-8b": _size(4096, 14336, 32, 32, **_LLAMA_3, **_SCALED_BY_8),
            "llama-3.1-70b": _size(8192, 28672, 80, 64, **_LLAMA_3, **_SCALED_BY_8),
            "llama-3.2-1b": _size(2048, 8192, 16, 32, **{**_LLAMA_3, "head_dim": 64}, **_SCALED_BY_32),
            "llama-3.2-3b": _size(3072, 8192, 28, 24, **_LLAMA_3, **_SCALED_BY_32),
            "deepseek-r1-distill-llama-8b": _size(4096, 14336, 32, 32, **_LLAMA_3, **_SCALED_BY_8),
            "deepseek-r1-distill-llama-70b": _size(8192, 28672, 80, 64, **_LLAMA_3, **_SCALED_BY_8),
        },
    ),
)
