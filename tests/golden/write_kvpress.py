"""Writes how kvpress (github.com/NVIDIA/kvpress) scores the tokens of one attention layer of Llama and of Qwen3.

The code is `score` of the presses in kvpress 0.5.5 (PyPI), run on a CPU with Python 3.11, torch 2.13.0+cpu,
transformers 5.2.0 and numpy 2.4.6:

    python -m venv golden && golden/bin/pip install kvpress==0.5.5 torch==2.13.0 transformers==5.2.0 numpy==2.4.6
    HF_HUB_OFFLINE=1 golden/bin/python tests/golden/write_kvpress.py

B = 2 sequences of S = 96 tokens, N = 4 query heads, K = 2 key/value heads, D = 16, width M = 64; weights are normal and
so large that attention is far from flat. `kvpress.npz` holds, for MODEL in llama, qwen3 (which has norms of queries
and keys),

    MODEL/queries              [B, N, S, D]  float32, rotated
    MODEL/keys                 [B, K, S, D]  float32, rotated
    MODEL/values               [B, K, S, D]  float32
    MODEL/output               [N, D, M]     float32, the output projection
    MODEL/positions            [S]           int32
    MODEL/theta                scalar        float64, of RoPE
    MODEL/PRESS                [B, K, S]     float32, scores, higher is kept

where PRESS is one of

    snapkv                     window of 16, kernel of 5; the window itself has a score above all others
    tova                       the last token has a score above all others
    expected_attention         mean and covariance, 64 positions to come, epsilon 0; the 4 sinks are above all others
    expected_attention_mean    without covariance, epsilon 1e-2
    knorm, keydiff
    observed                   mean weight over the queries that see a token
    lagkv                      4 sinks, chunks of 16; rank / 16 in a chunk, 1 in sinks, last chunk and tail
    critical_snapkv            48 of 96 tokens kept; those of the first stage, 24, have the largest float32
    critical_knorm             the same on top of knorm
    value_norms                [B, K, S], the factor that the second stage of the two before multiplies with
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from kvpress import (
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    SnapKVPress,
    TOVAPress,
)
from kvpress.utils import get_prerope_key_states, get_prerope_query_states
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

BATCH, TOKENS, WIDTH, HEADS, KEY_HEADS, SIZE = 2, 96, 64, 4, 2, 16
MODELS = {
    "llama": (LlamaConfig, LlamaAttention, LlamaRotaryEmbedding),
    "qwen3": (Qwen3Config, Qwen3Attention, Qwen3RotaryEmbedding),
}
TARGET = Path(__file__).parent / "kvpress.npz"


def attention_layer(name: str, seed: int) -> torch.nn.Module:
    """One layer with normal weights; the norms of queries and keys, where there are some, spread about 1.5."""
    config_class, attention_class, rotary_class = MODELS[name]
    config = config_class(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=SIZE,
        num_hidden_layers=1,
        max_position_embeddings=512,
    )
    config._attn_implementation = "sdpa"
    module = attention_class(config, layer_idx=0).eval()
    module.rotary_emb = rotary_class(config)
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        normal = torch.randn(weight.shape, generator=generator)
        weight.data = 0.2 * normal if weight.ndim == 2 else 1.5 + 0.3 * normal
    return module


def presses() -> dict[str, Any]:
    """Name in the file -> press."""
    expected = dict(n_future_positions=64, n_sink=4, use_vnorm=True)
    snapkv = dict(window_size=16, kernel_size=5)
    return {
        "snapkv": SnapKVPress(**snapkv),
        "tova": TOVAPress(),
        "expected_attention": ExpectedAttentionPress(**expected, use_covariance=True, epsilon=0.0),
        "expected_attention_mean": ExpectedAttentionPress(**expected, use_covariance=False, epsilon=1e-2),
        "knorm": KnormPress(),
        "keydiff": KeyDiffPress(),
        "observed": ObservedAttentionPress(),
        "lagkv": LagKVPress(n_sink=4, lag_size=16),
        "critical_snapkv": CriticalKVPress(SnapKVPress(compression_ratio=0.5, **snapkv)),
        "critical_knorm": CriticalKVPress(KnormPress(compression_ratio=0.5)),
    }


def causal_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Probabilities `B N S S`."""
    logits = queries @ keys.repeat_interleave(HEADS // KEY_HEADS, dim=1).transpose(2, 3) / SIZE**0.5
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(dim=-1)


def arrays_of(name: str, seed: int) -> dict[str, np.ndarray]:
    """Inputs and scores of one model."""
    module = attention_layer(name, seed)
    hidden = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    positions = torch.arange(TOKENS)
    cos, sin = module.rotary_emb(hidden, positions[None])
    queries, keys = get_prerope_query_states(module, hidden), get_prerope_key_states(module, hidden)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    values = module.v_proj(hidden).view(BATCH, TOKENS, KEY_HEADS, SIZE).transpose(1, 2)
    weights = causal_weights(queries, keys)
    peak = float(weights[:, :, TOKENS // 2 :].amax(dim=-1).mean())
    if not 0.15 < peak < 0.9:
        raise ValueError(f"attention is too flat or too sharp: the mean of the largest weights is {peak}")
    made = dict(
        queries=queries,
        keys=keys,
        values=values,
        output=module.o_proj.weight.T.reshape(HEADS, SIZE, WIDTH),
        positions=positions.to(torch.int32),
        theta=torch.tensor(module.config.rope_parameters["rope_theta"], dtype=torch.float64),
        value_norms=CriticalKVPress.vwl1norm(values, module),
    )
    for press_name, press in presses().items():
        seen = weights if press_name == "observed" else None
        extra = {"position_embeddings": (cos, sin)}
        made[press_name] = press.score(module, hidden, keys.clone(), values.clone(), seen, extra)
    return {f"{name}/{key}": array.contiguous().numpy() for key, array in made.items()}


@torch.no_grad()
def main() -> None:
    arrays = {key: array for seed, name in enumerate(MODELS) for key, array in arrays_of(name, 10 * seed).items()}
    np.savez_compressed(TARGET, **arrays)
    for key, array in arrays.items():
        print(key, array.shape, array.dtype)


if __name__ == "__main__":
    main()
