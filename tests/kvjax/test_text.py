"""Tokenizers, chat templates and streaming, on the real Qwen3 and DeepSeek-R1 tokenizers."""

import gzip
import json
import shutil

import pytest

from kvjax.byte_tokenizer import byte_characters, write_byte_tokenizer
from kvjax.errors import UserError
from kvjax.text import load_tokenizer

HARD = "Hello wörld, 你好 🤗 👩‍🚀 naïve\n\n  two  spaces\tand a tab"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>hm</think>Hello."},
    {"role": "user", "content": "2+2?"},
]


def unpack(source, target):
    (target / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copy(source / "tokenizer_config.json", target)
    return load_tokenizer(target)


@pytest.fixture(scope="module")
def qwen3(shared_data, tmp_path_factory):
    return unpack(shared_data / "qwen3-tokenizer", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def deepseek(shared_data, tmp_path_factory):
    return unpack(shared_data / "deepseek-r1-tokenizer", tmp_path_factory.mktemp("deepseek"))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder, vocab_size=384, max_positions=1024)
    return load_tokenizer(folder)


def test_qwen3_chat_prompt(qwen3):
    assert qwen3.chat(CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert qwen3.chat(CONVERSATION, enable_thinking=False).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert qwen3.stop_tokens == (151645,)
    assert qwen3.encode("<|im_end|>") == [151645]


def test_deepseek_chat_prompt(deepseek):
    prompt = deepseek.chat(CONVERSATION)
    assert prompt == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜>Hello.<｜end▁of▁sentence｜>"
        "<｜User｜>2+2?<｜Assistant｜>"
    )
    assert deepseek.encode(prompt, add_special_tokens=False)[:2] == [0, *deepseek.encode("Be")[1:]]


def test_the_first_token_is_added_where_the_settings_ask_for_it(deepseek, qwen3):
    """DeepSeek's tokenizer.json does not add it; add_bos_token in tokenizer_config.json does."""
    assert deepseek.encode("Hello") == [0, *deepseek.encode("Hello", add_special_tokens=False)]
    assert qwen3.encode("Hello") == qwen3.encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize("name", ["qwen3", "deepseek", "byte_tokenizer"])
@pytest.mark.parametrize("step", [1, 3])
def test_streaming_prints_no_half_character(name, step, request):
    tokenizer = request.getfixturevalue(name)
    tokens = tokenizer.encode(HARD, add_special_tokens=False)
    stream = tokenizer.stream()
    pieces = [stream.push(tokens[at : at + step]) for at in range(0, len(tokens), step)]
    assert stream.finish() == ""
    assert "".join(pieces) == HARD
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_broken_character_appears_at_the_end_only(byte_tokenizer):
    stream = byte_tokenizer.stream()
    assert stream.push([0x61, 0xF0, 0x9F]) == "a"
    assert "\N{REPLACEMENT CHARACTER}" in stream.finish()


def test_special_tokens_are_skipped_or_shown(byte_tokenizer):
    tokens = [*b"ab", 256, *b"c"]
    assert byte_tokenizer.stream().push(tokens) == "abc"
    assert byte_tokenizer.stream(skip_special_tokens=False).push(tokens) == "ab<|endoftext|>c"


def test_byte_tokens_are_bytes(byte_tokenizer):
    text = bytes(range(1, 128)).decode() + "é🤗"
    assert byte_tokenizer.encode(text) == list(text.encode())
    assert byte_tokenizer.decode(list(text.encode())) == text
    assert byte_tokenizer.vocab_size == 384
    assert byte_tokenizer.stop_tokens == (256,)
    assert len(set(byte_characters())) == 256
    assert byte_tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_templates_reach_nothing_and_their_refusals_are_ours(tmp_path):
    write_byte_tokenizer(tmp_path, vocab_size=300, max_positions=16)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    messages = [{"role": "user", "content": "Hi"}]
    for template, message in (
        ("{{ raise_exception('no system turn') }}", "no system turn"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{% for %}", "chat template is malformed"),
        ("{{ 1 / 0 }}", "does not take these messages: division by zero"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path).chat(messages)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]})
    )
    assert load_tokenizer(tmp_path).chat(messages) == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert load_tokenizer(tmp_path).chat(messages) == "z"


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        load_tokenizer(tmp_path / "none here")
    with pytest.raises(UserError, match=r"There is no .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_without_template_says_so(tmp_path):
    write_byte_tokenizer(tmp_path, vocab_size=300, max_positions=16)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(tmp_path).chat([{"role": "user", "content": "Hi"}])


def test_templates_are_rendered_as_transformers_does(tmp_path):
    """No tools means None, replies marked for training are plain text, and tojson takes its arguments."""
    write_byte_tokenizer(tmp_path, vocab_size=300, max_positions=16)
    template = (
        "{% if tools is not none %}TOOLS{% endif %}{% generation %}{{ messages[0].content }}{% endgeneration %}"
        "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, separators=(',', ':')) }}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    assert load_tokenizer(tmp_path).chat([{"role": "user", "content": "Hi"}]) == 'Hi{"a":"é","b":1}'


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "special token in tokenizer_config.json is no text but 5"),
        ("tokenizer_config.json", {"chat_template": 5}, "is no text but 5"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": 5}]}, "is no text but 5"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ("generation_config.json", {"eos_token_id": [1, None]}, "a token id or a list"),
        ("generation_config.json", {"eos_token_id": 10**12}, "a token id or a list"),
    ],
)
def test_odd_values_are_named(tmp_path, file, content, message):
    write_byte_tokenizer(tmp_path, vocab_size=300, max_positions=16)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)
