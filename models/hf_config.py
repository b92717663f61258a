"""Reads and writes `config.json` as transformers 4 and 5 have it; every field is used, harmless, or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from kvjax.errors import UserError, unknown
from kvjax.folder import read_json
from models.config import DTYPES, FAMILIES, Family, ModelConfig
from models.hf_rope import parse_rope

_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "feed_forward",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_size",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tied_embeddings",
    "max_position_embeddings": "max_positions",
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KINDS = {name: int if kind == int | None else kind for name, kind in get_type_hints(ModelConfig).items()}
"""Field of `ModelConfig` -> its type; `int | None` counts as `int`."""
_READ_APART = ("model_type", "hidden_act", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters")

_TRAINING = ("attention_dropout", "chunk_size_feed_forward", "hidden_dropout", "initializer_range", "pretraining_tp")
_BOOKKEEPING = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "auto_map",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "tokenizer_class",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id")  # eos is read by the tokenizer
_GENERATION = ("do_sample", "max_length", "max_new_tokens", "temperature", "top_k", "top_p")  # generation_config.json's
_HARMLESS = frozenset(_TRAINING + _BOOKKEEPING + _SPECIAL_TOKENS + _GENERATION)
"""Keys that cannot change what a model computes."""

_ONLY_IF = {
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "rope_interleaved": False,
    "pruned_heads": {},
}
"""Keys that are harmless at one value."""


def read_config(path: str | Path) -> ModelConfig:
    """Reads a `config.json`.

    Args:
      path: the file.

    Raises:
      UserError: the file is missing or malformed, or holds a model type, field or value that is not supported.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}: a checkpoint folder holds a config.json.")
    return parse_config(read_json(Path(path)), source=str(path))


def published_config(name: str) -> ModelConfig:
    """The dimensions of a published model.

    Args:
      name: e.g. "qwen3-8b".

    Raises:
      UserError: the name is unknown.
    """
    sizes = {size: family for family in FAMILIES.names() for size in FAMILIES.get(family).sizes}
    if name not in sizes:
        raise unknown("published model", name, sizes)
    family = sizes[name]
    return parse_config({"model_type": family, "dtype": "bfloat16", **FAMILIES.get(family).sizes[name]}, source=name)


def parse_config(fields: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Turns the fields of a `config.json` into a `ModelConfig`; see `read_config`."""
    family = _family(fields, source)
    _refuse_unknown(fields, family, source)
    for name in _REQUIRED:
        if fields.get(name) is None:
            raise UserError(f"{source} lacks the field '{name}', a whole number.")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act is '{fields['hidden_act']}'; only 'silu' is supported.")
    given = {**family.assumed, **fields}
    if given.get("use_sliding_window") is False:
        given["sliding_window"] = None
    table = {**{key: (ours,) for key, ours in _COMMON.items()}, **family.reads}
    values = {}
    for key, names in table.items():
        if given.get(key) is not None:
            values |= dict.fromkeys(names, _checked(key, given[key], _KINDS[names[0]], source))
    _check_layer_types(given, source)
    values.update(family.fixed)
    values.setdefault("num_kv_heads", values["num_query_heads"])
    if "head_size" not in values:
        values["head_size"] = _implied_head_size(values, source)
    dtype = given.get("dtype") or given.get("torch_dtype") or "float32"
    positions = values.get("max_positions", ModelConfig.max_positions)
    rope = parse_rope(given, head_size=values["head_size"], max_positions=positions, source=source)
    config = ModelConfig(model_type=fields["model_type"], rope=rope, dtype=dtype, **values)
    _check(config, source)
    return config


def _checked(name: str, value: Any, kind: type, source: str) -> Any:
    """The value of a field if it is of its kind: a whole number or a number above 0, or true or false."""
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{source}: the field '{name}' must be true or false, not {value!r}.")
    fits = isinstance(value, (int, float) if kind is float else int)
    if isinstance(value, bool) or not fits or not 0 < value < float("inf"):
        what = "a number" if kind is float else "a whole number"
        raise UserError(f"{source}: the field '{name}' must be {what} above 0, not {value!r}.")
    return kind(value) if kind is float else value


def _implied_head_size(values: Mapping[str, Any], source: str) -> int:
    """Width over query heads, where the file has no head_dim."""
    if values["width"] % values["num_query_heads"]:
        raise UserError(
            f"{source}: hidden_size {values['width']} is no multiple of num_attention_heads "
            f"{values['num_query_heads']}, and there is no head_dim."
        )
    return values["width"] // values["num_query_heads"]


def _family(fields: Mapping[str, Any], source: str) -> Family:
    if not isinstance(fields.get("model_type"), str):
        raise UserError(f"{source} names no model_type; known: {', '.join(FAMILIES.names())}.")
    try:
        return FAMILIES.get(fields["model_type"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _refuse_unknown(fields: Mapping[str, Any], family: Family, source: str) -> None:
    """Refuses a field that nothing here reads: it might change the model."""
    known = {*_COMMON, *_READ_APART, *_HARMLESS, *family.reads, *family.assumed, *family.ignores, "layer_types"}
    for name, value in fields.items():
        if name in known or value is None or (name in _ONLY_IF and _ONLY_IF[name] == value):
            continue
        if name == "quantization_config":
            method = value.get("quant_method", "unnamed") if isinstance(value, dict) else value
            raise UserError(f"{source}: weights quantised with '{method}' are not supported; use a bf16 checkpoint.")
        if name in _ONLY_IF:
            raise UserError(f"{source}: {name} = {value!r} is not supported; only {_ONLY_IF[name]!r} is.")
        raise UserError(
            f"{source}: the field '{name}' = {str(value)[:80]!r} is unknown and might change the model; "
            "delete it from the file if it does not."
        )


def _check_layer_types(given: Mapping[str, Any], source: str) -> None:
    """Full attention everywhere, or a sliding window everywhere (refused later, where a cache would exceed it)."""
    types = given.get("layer_types") or ["full_attention"]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise UserError(f"{source}: layer_types is {types!r}; a list of names was expected.")
    kinds = set(types)
    if kinds == {"full_attention"} or (kinds == {"sliding_attention"} and given.get("sliding_window")):
        return
    raise UserError(f"{source}: layer_types {sorted(kinds)} are not supported; only 'full_attention' is.")


def _check(config: ModelConfig, source: str) -> None:
    """Refuses dimensions that cannot be."""
    if config.num_query_heads % config.num_kv_heads:
        raise UserError(
            f"{source}: {config.num_query_heads} query heads cannot share {config.num_kv_heads} key/value heads; "
            "the second must divide the first."
        )
    if config.head_size % 2:
        raise UserError(f"{source}: the head size {config.head_size} is odd; RoPE turns pairs.")
    if config.dtype not in DTYPES:
        raise UserError(f"{source}: dtype '{config.dtype}' is not supported; give one of {', '.join(DTYPES)}.")


def config_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of a `config.json` for a model, as transformers reads them.

    Args:
      config: a config with plain RoPE.
    """
    if config.rope.scaling is not None:
        raise NotImplementedError("Writing a config.json with scaled RoPE is not supported.")
    family = FAMILIES.get(config.model_type)
    table = {**{key: (ours,) for key, ours in _COMMON.items()}, **family.reads}
    fields = {key: getattr(config, names[0]) for key, names in table.items()}
    architecture = config.model_type.capitalize() + "ForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": config.model_type,
        "hidden_act": "silu",
        "rope_theta": config.rope.theta,
        "torch_dtype": config.dtype,
        **({"use_sliding_window": False} if "use_sliding_window" in family.assumed else {}),
        **fields,
    }
