"""The fields that every decoding config has, with their defaults."""

from ml_collections import ConfigDict, config_dict


def decode_config(model: str) -> ConfigDict:
    """Settings of `python -m kvjax.decode`.

    Args:
      model: a checkpoint folder, relative to here or to the project's root, or a hub name.
    """
    return ConfigDict(
        {
            "model": model,
            "tokenizer": config_dict.placeholder(str),  # another folder with tokenizer files; the model's own if unset
            "dtype": config_dict.placeholder(str),  # of parameters, activations and cache; the checkpoint's if unset
            "policy": "full",
            "statistics": config_dict.placeholder(str),  # file of kvjax.calibrate, for policies that need one
            # What --prompt is, where that is not given: a text, or a problem with a known answer, such as
            # 'dfs(nodes=14)' (kvjax/tasks/), and its number.
            "prompt": config_dict.placeholder(str),
            "task": config_dict.placeholder(str),
            "task_example": 0,
            "compare_with_full": False,  # decode with the uncompressed cache too, and show how the two differ
            "chat": False,  # put prompts through the chat template, as the user's words
            "system_prompt": config_dict.placeholder(str),
            "template": {"enable_thinking": config_dict.placeholder(bool)},  # variables of the chat template
            "batch": 8,  # prompts of a --prompts file that are decoded together
            "max_tokens": config_dict.placeholder(int),  # room of the cache; what a batch needs if unset
            "max_new_tokens": 256,
            "steps_per_dispatch": 16,  # tokens between two looks at the screen
            "stop_at_end": True,  # whether end-of-text tokens end a generation
            # Unset fields follow the checkpoint's generation_config.json; where that does not sample, greedy. A top_k
            # that neither names keeps all tokens.
            "sampling": {
                "temperature": config_dict.placeholder(float),
                "top_k": config_dict.placeholder(int),
                "top_p": config_dict.placeholder(float),
                "min_p": config_dict.placeholder(float),
                "seed": 0,
            },
            # Chips over which sequences (data) and heads (model) are spread; -1 takes all that the other leaves.
            "mesh": {"data": 1, "model": 1},
        }
    )
