"""Trains the small model that lies in `models/tiny`.

    python -m kvjax.train --config=configs/tiny_train.py

1,083,008 parameters on 7 MB of English: Shakespeare, Moby Dick, school problems with worked solutions.
"""

from ml_collections import ConfigDict

TEXTS = "../shared/data/"


def get_config() -> ConfigDict:
    """The settings of the run."""
    return ConfigDict(
        {
            "model": {
                "model_type": "qwen3",
                "vocab_size": 384,  # 256 bytes, 3 special tokens, symbols for the tasks to come
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
            # Rows of each step and tokens of each row: short rows first, then the whole context.
            "stages": (
                {"steps": 1600, "rows": 16, "tokens": 256},
                {"steps": 400, "rows": 4, "tokens": 1024},
            ),
            "learning_rate": 3e-3,
            "final_learning_rate_share": 0.05,
            "warmup_steps": 150,
            "beta1": 0.9,
            "beta2": 0.98,
            "weight_decay": 0.05,
            "max_gradient_norm": 1.0,
            "seed": 0,
            "checkpoint_folder": "build/tiny_train",
            "checkpoint_every": 200,
            "validate_every": 100,
            "output": "models/tiny",
        }
    )
