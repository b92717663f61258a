"""config.json of transformers 4 and 5: every field used, harmless or refused; published sizes against real files."""

import json

import pytest

from kvjax.errors import UserError
from kvjax.rope import Llama3Scaling, YarnScaling
from models.config import FAMILIES
from models.hf_config import parse_config, published_config, read_config

BASE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def parse(**changes):
    fields = {**BASE, **changes}
    return parse_config({name: value for name, value in fields.items() if value is not ...}, source="config.json")


def test_published_sizes_equal_the_real_files(shared_data):
    """Every file of a family that we have, against the size of that name."""
    compared = 0
    for path in sorted((shared_data / "model-configs").glob("*.json")):
        fields = json.loads(path.read_text())
        if fields["model_type"] not in FAMILIES.names():
            with pytest.raises(UserError, match=f"Unknown model type '{fields['model_type']}'"):
                read_config(path)
            continue
        fields.setdefault("torch_dtype", "bfloat16")
        assert published_config(path.stem) == parse_config(fields, source=str(path)), path.stem
        compared += 1
    assert compared == 8


def test_a_real_config_file_is_read(shared_data):
    config = read_config(shared_data / "qwen3-tokenizer" / "config.qwen3-1.7b.json")
    assert config == published_config("qwen3-1.7b")


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen3-0.6b", 0.596),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.76),
        ("llama-2-7b", 6.74),
        ("llama-3.1-8b", 8.03),
        ("llama-3.1-70b", 70.55),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("mistral-7b-v0.3", 7.248),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-7b", 7.616),
        ("deepseek-r1-distill-qwen-1.5b", 1.777),
        ("deepseek-r1-distill-llama-8b", 8.03),
    ],
)
def test_published_parameter_counts(name, billions):
    assert published_config(name).num_parameters() / 1e9 == pytest.approx(billions, rel=1e-3)


def test_every_published_size_parses():
    for family in FAMILIES.names():
        for size in FAMILIES.get(family).sizes:
            assert published_config(size).model_type == family
    with pytest.raises(UserError, match="Unknown published model 'qwen3-9b'. Did you mean 'qwen3-8b'"):
        published_config("qwen3-9b")


def test_versions_4_and_5_of_transformers_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    four = parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}, torch_dtype="bfloat16")
    five = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}, dtype="bfloat16")
    assert four == five
    assert four.rope.theta == 5e5
    assert four.rope.scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64
    )
    assert four.dtype == "bfloat16"
    old = parse(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    assert old.rope.scaling == YarnScaling(factor=4.0, original_max_positions=64)
    assert parse(rope_scaling=None).rope.scaling is None


def test_defaults_are_those_of_transformers():
    config = parse()
    assert (config.num_kv_heads, config.head_size) == (4, 8)
    assert (config.norm_epsilon, config.rope.theta, config.tied_embeddings) == (1e-6, 10_000.0, False)
    mistral = parse(model_type="mistral", num_attention_heads=8)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)
    qwen2 = parse(model_type="qwen2", num_key_value_heads=2, sliding_window=128)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.sliding_window) == (True, False, None)
    assert parse(model_type="qwen2", num_key_value_heads=2, use_sliding_window=True).sliding_window == 4096
    qwen3 = parse(model_type="qwen3", num_key_value_heads=2)
    assert (qwen3.qk_norm, qwen3.head_size) == (True, 128)
    assert parse(attention_bias=True).output_bias
    assert not parse(model_type="qwen2", num_key_value_heads=2, attention_bias=False).output_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "Unknown model type 'gpt2'. Known: llama, mistral, qwen2, qwen3"),
        ({"model_type": "qwen33"}, "Did you mean 'qwen3'"),
        ({"model_type": ...}, "names no model_type"),
        ({"attn_logit_softcapping": 50.0}, "the field 'attn_logit_softcapping' = '50.0' is unknown"),
        ({"hidden_size": ...}, "lacks the field 'hidden_size', a whole number"),
        ({"hidden_size": "32"}, "'hidden_size' must be a whole number above 0, not '32'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "the head size 7 is odd"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights quantised with 'fp8' are not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "Unknown rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "Unknown rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "lacks the parameter 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks the parameter 'low_freq_factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "warp": 1}}, "unknown parameters: warp"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* are not supported"),
        ({"use_mrope": True}, "use_mrope = True is not supported"),
        ({"num_key_value_heads": "2"}, "'num_key_value_heads' must be a whole number above 0, not '2'"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' must be a whole number above 0, not 0"),
        ({"head_dim": -2}, "'head_dim' must be a whole number above 0"),
        ({"num_hidden_layers": True}, "'num_hidden_layers' must be a whole number above 0, not True"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number above 0"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' must be true or false, not 'false'"),
        ({"max_position_embeddings": "x"}, "'max_position_embeddings' must be a whole number"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"layer_types": 5}, "layer_types is 5; a list of names was expected"),
        ({"layer_types": [1]}, "a list of names was expected"),
        ({"model_type": ["qwen3"]}, "names no model_type"),
    ],
)
def test_what_might_change_the_model_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        parse(**changes)


def test_harmless_fields_are_passed_over():
    parse(use_mrope=False, transformers_version="4.33", pad_token_id=0, use_cache=True, pretraining_tp=1)
    parse(_attn_implementation_autoset=True, tokenizer_class="X", do_sample=True, quantization_config=None)
    parse(pruned_heads={}, rope_interleaved=False, some_new_field=None)


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="There is no"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="holds a list"):
        read_config(path)
