"""Writes tiny random checkpoints and the logits that Hugging Face transformers gives for them.

Runs in an environment of its own, which the project does not need otherwise:

    python -m venv golden && golden/bin/pip install torch==2.13.0 transformers==5.23.0
    golden/bin/python tests/golden/write_transformers.py

Each folder of `tests/golden/transformers/` is what `save_pretrained` writes (bfloat16 weights), and `logits.npz`:
`tokens` [332], `prompt_logits` [300, V] of one pass over the first 300, `step_logits` [32, V] of feeding the next 32
one by one with transformers' own cache, all in float32. Tokens after the prompt are the greedy ones.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

PROMPT, STEPS, VOCAB = 300, 32, 64
TARGET = Path(__file__).parent / "transformers"
COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
YARN_MSCALE = dict(YARN, mscale=1.0, mscale_all_dim=0.5, beta_fast=16.0, beta_slow=2.0, truncate=False)

MODELS = {
    "llama2": (transformers.LlamaConfig, dict(num_key_value_heads=4)),
    "llama31": (transformers.LlamaConfig, dict(num_key_value_heads=2, rope_parameters=LLAMA3, rope_theta=10000.0)),
    "llama32_tied": (
        transformers.LlamaConfig,
        dict(num_key_value_heads=2, rope_parameters=LLAMA3, head_dim=16, tie_word_embeddings=True),
    ),
    "llama_biased": (transformers.LlamaConfig, dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "mistral": (transformers.MistralConfig, dict(num_key_value_heads=1, head_dim=16, sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, dict(num_key_value_heads=2)),
    "qwen3": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=16)),
    "yarn": (transformers.Qwen3Config, dict(num_key_value_heads=2, head_dim=16, rope_parameters=YARN)),
    "yarn_mscale": (transformers.LlamaConfig, dict(num_key_value_heads=2, head_dim=16, rope_parameters=YARN_MSCALE)),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that attention is far from flat; biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise if "embed" in name else 0.3 * noise)


def logits_of(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """One pass over a random prompt, then greedy steps with the cache."""
    prompt = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, (1, PROMPT)))
    with torch.no_grad():
        done = model(prompt, use_cache=True)
        tokens, steps, cache = prompt[0].tolist(), [], done.past_key_values
        newest = done.logits[0, -1].argmax()
        for _ in range(STEPS):
            tokens.append(int(newest))
            step = model(newest.reshape(1, 1), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits[0, -1].numpy())
            newest = step.logits[0, -1].argmax()
    return dict(tokens=np.asarray(tokens, np.int32), prompt_logits=done.logits[0].numpy(), step_logits=np.stack(steps))


def main() -> None:
    for seed, (name, (config_class, fields)) in enumerate(MODELS.items()):
        config = config_class(**{**COMMON, **fields})
        model = transformers.AutoModelForCausalLM.from_config(config)
        randomise(model, seed)
        folder = TARGET / name
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB" if name == "qwen3" else "1GB")
        stored = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        np.savez_compressed(folder / "logits.npz", **logits_of(stored.eval(), seed))
        print(name, sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
