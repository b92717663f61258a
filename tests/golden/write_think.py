"""Writes which key channels kvpress' ThinK (arXiv 2407.21018) prunes from one set of queries and keys, on a CPU.

The code is `ThinKPress.compress` of `kvpress/presses/think_press.py` in kvpress 0.5.4 (github.com/NVIDIA/kvpress, tag
v0.5.4, commit 6d965557a5b9f0201a2301b23c454473dd681d0d), run with Python 3.11, torch 2.13.0, transformers 5.2.0 and
numpy 2.4.6:

    python -m venv golden && golden/bin/pip install kvpress==0.5.4 torch==2.13.0 transformers==5.2.0 numpy==2.4.6
    golden/bin/python tests/golden/write_think.py

B = 2 sequences, N = 4 query heads, K = 2 key heads, T = 96 tokens, D = 64 channels, a window of W = 32 queries, half
of the channels pruned. `think.npz` holds

    queries        [B, N, W, D]  float32, the last W queries after rotation
    keys           [B, K, T, D]  float32
    scores         [B, K, D]     float32, what kvpress ranks the channels by
    pruned         [B, K, D/2]   int32, the channels it prunes, ascending
    keys_pruned    [B, K, T, D]  float32, the keys it gives back: pruned channels are zero

The queries come to kvpress as hidden states under a projection and a rotation that change nothing.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from kvpress import ThinKPress
from torch.overrides import TorchFunctionMode

BATCH, HEADS, KEY_HEADS, TOKENS, WINDOW, CHANNELS, RATIO = 2, 4, 2, 96, 32, 64, 0.5
MARGIN = 1e-3
TARGET = Path(__file__).parent / "think.npz"


class RecordTopk(TorchFunctionMode):
    """Keeps what `topk` is called with and what it finds: compress() gives neither back."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.topk:
            self.scores, self.indices = args[0], result.indices
        return result


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal queries and keys, each channel of each head at a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    query_scale = torch.exp(0.5 * torch.randn(HEADS, 1, CHANNELS, generator=generator))
    key_scale = torch.exp(0.5 * torch.randn(KEY_HEADS, 1, CHANNELS, generator=generator))
    queries = query_scale * torch.randn(BATCH, HEADS, WINDOW, CHANNELS, generator=generator)
    keys = key_scale * torch.randn(BATCH, KEY_HEADS, TOKENS, CHANNELS, generator=generator)
    return queries, keys


def attention_module() -> SimpleNamespace:
    """What `compress` reads of an attention layer; its projection gives hidden states back as queries."""
    config = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS)
    return SimpleNamespace(config=config, head_dim=CHANNELS, q_proj=torch.nn.Identity())


def prune(queries: torch.Tensor, keys: torch.Tensor) -> dict[str, np.ndarray]:
    """One call of `compress`, which writes into the keys it is given."""
    module, press = attention_module(), ThinKPress(key_channel_compression_ratio=RATIO, window_size=WINDOW)
    hidden = queries.transpose(1, 2).reshape(BATCH, WINDOW, HEADS * CHANNELS)
    turn = torch.ones(BATCH, WINDOW, CHANNELS), torch.zeros(BATCH, WINDOW, CHANNELS)
    seen = press.compute_window_queries(module, hidden, turn)
    if not torch.equal(seen, queries):
        raise ValueError("kvpress sees other queries than those stored")
    extra = dict(hidden_states=hidden, position_embeddings=turn)
    with RecordTopk() as record:
        keys_pruned, _ = press.compress(module, hidden, keys.clone(), torch.zeros_like(keys), None, extra)
    pruned = record.indices.sort(dim=-1).values
    ranked, count = record.scores.sort(dim=-1).values, pruned.shape[-1]
    gap = float((ranked[..., count] / ranked[..., count - 1] - 1).min())
    if gap < MARGIN:
        raise ValueError(f"the last pruned and the first kept channel differ by {gap} only; take another seed")
    return dict(scores=record.scores.numpy(), pruned=pruned.to(torch.int32).numpy(), keys_pruned=keys_pruned.numpy())


def main() -> None:
    queries, keys = inputs(0)
    arrays = dict(queries=queries.numpy(), keys=keys.numpy(), **prune(queries, keys))
    np.savez_compressed(TARGET, **arrays)
    for name, array in arrays.items():
        print(name, array.shape, array.dtype)


if __name__ == "__main__":
    main()
