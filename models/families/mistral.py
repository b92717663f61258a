"""Mistral 7B: a Llama whose file may limit every layer to a sliding window (v0.1 does, later ones do not)."""

from models.config import FAMILIES, Family

_SEVEN_BILLION = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
}

FAMILIES.register(
    "mistral",
    Family(
        assumed={
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        reads={"sliding_window": ("sliding_window",)},
        sizes={
            "mistral-7b-v0.1": {**_SEVEN_BILLION, "vocab_size": 32000, "sliding_window": 4096},
            "mistral-7b-v0.3": {
                **_SEVEN_BILLION,
                "vocab_size": 32768,
                "rope_theta": 1e6,
                "sliding_window": None,
            },
        },
    ),
)
