"""Reads and writes `config.json` as transformers 4 and 5 have it; every field is used, harmless, or refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvjax.errors import UserError, unknown
from kvjax.rope import Llama3Scaling, Rope, YarnScaling
from models.config import FAMILIES, Family, ModelConfig

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
_READ_APART = ("model_type", "hidden_act", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "rope_parameters")

_TRAINING = ("attention_dropout", "chunk_size_feed_forward", "hidden_dropout", "initializer_range", "pretraining_tp")
_BOOKKEEPING = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # read by the tokenizer
_HARMLESS = frozenset(_TRAINING + _BOOKKEEPING + _SPECIAL_TOKENS)
"""Keys that cannot change what a model computes."""

_ONLY_IF = {
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "is_decoder": None,  # any value: these are decoders
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}
"""Keys that are harmless at one value."""


def read_config(path: str | Path) -> ModelConfig:
    """Reads a `config.json`.

    Args:
      path: the file.

    Raises:
      UserError: the file is missing or malformed, or holds a model type, field or value that is not supported.
    """
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}: a checkpoint folder holds a config.json.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}; a JSON object was expected.")
    return parse_config(fields, source=str(path))


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
        if not isinstance(fields.get(name), int):
            raise UserError(f"{source}: the field '{name}' must be a whole number, not {fields.get(name)!r}.")
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act is '{fields['hidden_act']}'; only 'silu' is supported.")
    given = {**family.assumed, **fields}
    if given.get("use_sliding_window") is False:
        given["sliding_window"] = None
    _check_layer_types(given, source)
    table = {**{key: (ours,) for key, ours in _COMMON.items()}, **family.reads}
    values = {ours: given[key] for key, names in table.items() for ours in names if given.get(key) is not None}
    values.update(family.fixed)
    values.setdefault("num_kv_heads", values["num_query_heads"])
    values.setdefault("head_size", values["width"] // values["num_query_heads"])
    rope = _parse_rope(given, values, source)
    dtype = given.get("dtype") or given.get("torch_dtype") or "float32"
    config = ModelConfig(model_type=fields["model_type"], rope=rope, dtype=dtype, **values)
    _check(config, source)
    return config


def _family(fields: Mapping[str, Any], source: str) -> Family:
    if "model_type" not in fields:
        raise UserError(f"{source} names no model_type; known: {', '.join(FAMILIES.names())}.")
    try:
        return FAMILIES.get(fields["model_type"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _refuse_unknown(fields: Mapping[str, Any], family: Family, source: str) -> None:
    """Refuses a field that nothing here reads: it might change the model."""
    known = {*_COMMON, *_READ_APART, *_HARMLESS, *family.reads, *family.assumed, *family.ignores, "layer_types"}
    for name, value in fields.items():
        if name in known or name in _ONLY_IF and (_ONLY_IF[name] in (None, value) or value is None):
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
    kinds = set(given.get("layer_types") or ("full_attention",))
    if kinds == {"full_attention"} or (kinds == {"sliding_attention"} and given.get("sliding_window")):
        return
    raise UserError(f"{source}: layer_types {sorted(kinds)} are not supported; only 'full_attention' is.")


def _parse_rope(given: Mapping[str, Any], values: Mapping[str, Any], source: str) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4)."""
    parameters = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or given.get("rope_theta") or 10_000.0
    named = {parameters.pop(key) for key in ("rope_type", "type") if key in parameters}
    kind = named.pop() if named else "default"
    if not isinstance(kind, str) or named:
        raise UserError(f"{source}: RoPE parameters per layer type are not supported.")
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{source}: a partial_rotary_factor other than 1 is not supported.")
    readers = {"default": _read_plain, "llama3": _read_llama3, "yarn": _read_yarn}
    if kind not in readers:
        raise UserError(f"{source}: {unknown('rope_type', kind, readers)}")
    original = parameters.pop("original_max_position_embeddings", None) or values.get("max_positions")
    try:
        scaling = readers[kind](parameters, original)
    except KeyError as error:
        raise UserError(f"{source}: RoPE of type '{kind}' lacks the parameter {error}.") from error
    if parameters:
        raise UserError(f"{source}: RoPE of type '{kind}' has unknown parameters: {', '.join(sorted(parameters))}.")
    return Rope(head_size=values["head_size"], theta=float(theta), scaling=scaling)


def _read_plain(parameters: dict[str, Any], original: int) -> None:
    """Takes nothing: plain RoPE has no parameters."""
    del parameters, original


def _read_llama3(parameters: dict[str, Any], original: int) -> Llama3Scaling:
    """Takes the llama3 parameters out of the dict."""
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return Llama3Scaling(original_max_positions=original, **{name: float(parameters.pop(name)) for name in names})


def _read_yarn(parameters: dict[str, Any], original: int) -> YarnScaling:
    """Takes the YaRN parameters out of the dict."""
    optional = {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "given_attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "truncate": "truncate",
    }
    found = {ours: parameters.pop(name) for name, ours in optional.items() if name in parameters}
    found = {name: value for name, value in found.items() if value is not None}
    return YarnScaling(factor=float(parameters.pop("factor")), original_max_positions=original, **found)


def _check(config: ModelConfig, source: str) -> None:
    """Refuses dimensions that cannot be."""
    if config.num_query_heads % config.num_kv_heads:
        raise UserError(
            f"{source}: {config.num_query_heads} query heads cannot share {config.num_kv_heads} key/value heads; "
            "the second must divide the first."
        )
    if config.head_size % 2:
        raise UserError(f"{source}: the head size {config.head_size} is odd; RoPE turns pairs.")
    if config.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{source}: dtype '{config.dtype}' is not supported; give float32, bfloat16 or float16.")


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
