"""A trained model that is not ours, end to end: it prints what its authors published."""

import json

import pytest

import kvjax
import models
from kvjax import decode
from kvjax._program import run
from tests.stories import PUBLISHED, convert


@pytest.fixture(scope="module")
def folder(shared_data, tmp_path_factory):
    target = tmp_path_factory.mktemp("stories260k")
    convert(shared_data / "stories260k", target)
    return target


def test_greedy_continuation_is_the_published_one(folder):
    """The model's first token alone, 200 new ones; prefill is one token and all else goes through the cache."""
    tokenizer = kvjax.load_tokenizer(folder)
    tokens = kvjax.generate(models.load_model(folder), [[1]], max_new_tokens=200)
    assert tokenizer.decode(tokens[0]) == PUBLISHED
    stream = tokenizer.stream()
    assert "".join(stream.push([token]) for token in tokens[0]) + stream.finish() == PUBLISHED


def test_the_program_continues_the_published_text(folder, capsys, tmp_path):
    """The prompt is the first sentence; the text that follows it is the published one."""
    prompt = PUBLISHED[: PUBLISHED.index(". She loved") + 1]
    report = tmp_path / "report.json"
    argv = ["decode", f"--config.model={folder}", f"--prompt={prompt}", "--config.max_new_tokens=100"]
    argv += ["--config.policy=full", "--noconfig.compare_with_full", f"--report={report}"]
    code = run(
        decode.main,
        usage="",
        default_config="configs/tiny_cpu.py",
        define_flags=decode.define_flags,
        argv=argv,
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert len(printed.out) > 250
    assert PUBLISHED.startswith(printed.out.strip())
    record = json.loads(report.read_text())
    assert record["new_tokens"] == 100
    # keys and values, and a position of 4 bytes for each of a layer's 128 slots
    assert record["cache_bytes"] == record["full_cache_bytes"] + 5 * 128 * 4
    reasons = "mosaic_tpu: it runs on TPUs, and this is cpu; triton_gpu: it runs on NVIDIA GPUs, and this is cpu"
    attention = {"exact": f"reference ({reasons})"}
    others = dict.fromkeys(("encode", "score", "select", "slots"), "reference")
    assert record["implementations"] == {"decode_attention": attention, **others}
    assert "100 new tokens" in printed.err
