"""Trains the small model that lies in `models/tiny`.

    python -m kvjax.train --config=configs/tiny_train.py

1,083,008 parameters: tasks in symbols (`kvjax/tasks/`), and 6 MB of English: Shakespeare, Moby Dick, school problems
with worked solutions.
"""

from ml_collections import ConfigDict

TEXTS = "../shared/data/"

# Shares of the rows: of all stages but the first, which is for what all tasks need, to look things up.
MIX = {
    "needle": 0.06,
    "passkey": 0.04,
    "recall": 0.14,
    "variables": 0.16,
    "hops": 0.08,
    "copy": 0.08,
    "sums": 0.11,
    "dfs": 0.27,
    "text": 0.06,
}
FIRST_MIX = {"needle": 0.2, "hops": 0.15, "copy": 0.15, "dfs": 0.25, "sums": 0.2, "text": 0.05}

# Rows of each step and tokens of each row. A stage ends when each task has that accuracy on rows that are not learned
# from, or after its most steps. The last one cools down, on rows that hold more questions than long ones do.
STAGES = (
    {"tokens": 48, "rows": 42, "mix": FIRST_MIX, "accuracy": 0.8, "most_steps": 500, "test_rows": 84},
    {"tokens": 64, "rows": 32, "accuracy": 0.95, "most_steps": 900, "test_rows": 64},
    {"tokens": 128, "rows": 16, "accuracy": 0.95, "most_steps": 1100, "test_rows": 64},
    {"tokens": 256, "rows": 8, "accuracy": 0.95, "most_steps": 700, "test_rows": 64},
    {"tokens": 512, "rows": 4, "most_steps": 200, "test_rows": 32},
    {"tokens": 1024, "rows": 2, "most_steps": 250, "test_rows": 16},
    {"tokens": 256, "rows": 8, "most_steps": 1200, "test_rows": 64},
)


def get_config() -> ConfigDict:
    """The settings of the run."""
    return ConfigDict(
        {
            "model": {
                "model_type": "qwen3",
                "vocab_size": 384,  # 256 bytes, 3 special tokens, 114 symbols (kvjax/symbols.py)
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 64,
                "rope_theta": 10_000.0,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": False,
            },
            "texts": (
                TEXTS + "tinyshakespeare/input.txt",
                TEXTS + "moby-dick/2701.txt",
                TEXTS + "gsm8k/train.jsonl",
            ),
            "held_out_share": 0.02,
            "mix": MIX,
            "text_weight": 0.3,
            "filler_weight": 0.1,
            "stages": STAGES,
            "learning_rate": 3e-3,
            "final_learning_rate_share": 0.05,
            "warmup_steps": 150,
            "beta1": 0.9,
            "beta2": 0.98,
            "weight_decay": 0.05,
            "max_gradient_norm": 1.0,
            "seed": 0,
            "checkpoint_folder": "build/tiny_train",
            "checkpoint_every": 100,
            "validate_every": 100,
            "output": "models/tiny",
        }
    )
