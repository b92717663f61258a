"""Statistics that TriAttention's authors publish: each head's numbers in their places, and no other file's."""

import dataclasses

import numpy as np
import pytest

from kvjax import triattention_file
from kvjax.errors import UserError
from kvjax.model_shape import ModelShape
from kvjax.rope import Rope
from kvjax.torch_file import read_torch
from kvjax.triattention_file import load_triattention

QWEN3_8B = ModelShape(
    num_layers=36,
    num_query_heads=32,
    num_kv_heads=8,
    head_size=128,
    dtype="bfloat16",
    vocab_size=151936,
    rope=Rope(head_size=128, theta=1e6),
)
SMALL = dataclasses.replace(
    QWEN3_8B, num_layers=2, num_query_heads=4, num_kv_heads=2, head_size=6, rope=Rope(head_size=6, theta=1e4)
)


@pytest.fixture(scope="module")
def published(shared_data):
    path = shared_data / "triattention-stats" / "qwen3_8b.aime25.pt"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the tree")
    return path


def entries():
    """A small table, each number its own."""
    numbers = iter(np.random.default_rng(0).normal(size=(8, 3, 3)).astype(np.float32))
    parts = ("q_mean_real", "q_mean_imag", "q_abs_mean")
    return {
        f"layer{layer:02d}_head{head:02d}": dict(zip(parts, next(numbers), strict=True))
        for layer in range(2)
        for head in range(4)
    }


def load(monkeypatch, content, shape=SMALL):
    """Loads a file of that content."""
    monkeypatch.setattr(triattention_file, "read_torch", lambda path: content)
    return load_triattention("x.pt", shape)


def refusal(monkeypatch, content, shape=SMALL):
    with pytest.raises(UserError) as caught:
        load(monkeypatch, content, shape)
    message = str(caught.value)
    assert "\n" not in message
    assert "x.pt" in message
    return message


def test_a_real_file(published):
    """Every head's centre, real part first, and its mean lengths, which no centre exceeds."""
    statistics = load_triattention(published, QWEN3_8B)
    stats = read_torch(published)["stats"]
    assert statistics.shape == QWEN3_8B
    assert statistics.source == str(published)
    assert statistics.about == {"model": "Qwen/Qwen3-8B"}
    assert len(statistics.layers) == 36
    for index, layer in enumerate(statistics.layers):
        mean, norm = np.asarray(layer.queries.mean), np.asarray(layer.queries_norm)
        assert (mean.shape, norm.shape, mean.dtype, norm.dtype) == ((32, 128), (32, 64), np.float32, np.float32)
        assert (np.hypot(mean[:, :64], mean[:, 64:]) <= norm * (1 + 1e-4)).all()
        assert norm.min() > 0
        for head in (0, 7, 31):
            theirs = stats[f"layer{index:02d}_head{head:02d}"]
            np.testing.assert_array_equal(mean[head, :64], theirs["q_mean_real"])
            np.testing.assert_array_equal(mean[head, 64:], theirs["q_mean_imag"])
            np.testing.assert_array_equal(norm[head], theirs["q_abs_mean"])
        assert layer.rope == QWEN3_8B.rope
        others = (layer.num_tokens, layer.keys, layer.keys_before_rope, layer.values, layer.queries_second)
        assert (*others, layer.queries.second, layer.values_weighted, layer.value_weight) == (None,) * 8


@pytest.mark.parametrize(
    ("name", "layers", "query_heads", "kv_heads"),
    [("qwen3_8b.aime24.pt", 36, 32, 8), ("ds_llama8b.aime24.pt", 32, 32, 8), ("ds_qwen7b.aime24.pt", 28, 28, 4)],
)
def test_the_other_real_files(shared_data, name, layers, query_heads, kv_heads):
    path = shared_data / "triattention-stats" / name
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the tree")
    shape = dataclasses.replace(QWEN3_8B, num_layers=layers, num_query_heads=query_heads, num_kv_heads=kv_heads)
    statistics = load_triattention(path, shape)
    assert len(statistics.layers) == layers
    assert statistics.layers[-1].queries.mean.shape == (query_heads, 128)


@pytest.mark.parametrize("changes", [{"num_layers": 28}, {"num_query_heads": 40}, {"head_size": 64}])
def test_a_real_file_for_another_model(published, changes):
    with pytest.raises(UserError, match=r"belong to another model: 36 layers of 32 query heads of size 128; this") as e:
        load_triattention(published, dataclasses.replace(QWEN3_8B, **changes))
    assert "\n" not in str(e.value)
    assert "python -m kvjax.calibrate" in str(e.value)


def test_numbers_by_name_in_any_order(monkeypatch):
    """Names say which head it is; metadata may be missing."""
    table = entries()
    statistics = load(monkeypatch, {"stats": dict(reversed(table.items()))})
    for (layer, head), name in zip(np.ndindex(2, 4), table, strict=True):
        mean = statistics.layers[layer].queries.mean[head]
        np.testing.assert_array_equal(mean, np.r_[table[name]["q_mean_real"], table[name]["q_mean_imag"]])
        np.testing.assert_array_equal(statistics.layers[layer].queries_norm[head], table[name]["q_abs_mean"])
    assert statistics.about == {"model": ""}


@pytest.mark.parametrize(
    "content",
    [None, 3, [], np.zeros(3), {}, {"stats": {}}, {"stats": [1]}, {"model": {"weight": np.zeros(3)}}],
    ids=str,
)
def test_files_of_another_kind(monkeypatch, content):
    assert "holds no TriAttention statistics" in refusal(monkeypatch, content)


def test_metadata_that_does_not_suit(monkeypatch):
    other = {"stats": entries(), "metadata": {"rope_style": "interleaved"}}
    assert "rope_style 'interleaved'; only 'half'" in refusal(monkeypatch, other)
    assert "'metadata' is no table" in refusal(monkeypatch, {"stats": entries(), "metadata": [1]})


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("layer0", {}, "an entry 'layer0' that is no layer and head with q_mean_real, q_mean_imag, q_abs_mean"),
        (7, {}, "an entry '7' that is no layer and head"),
        ("layer00_head00", [1], "an entry 'layer00_head00' that is no layer and head"),
        ("layer00_head00", {"q_mean_real": np.zeros(3)}, "an entry 'layer00_head00' that is no layer and head"),
        ("layer00_head00", {"q_abs_mean": 3.0}, "are no vectors"),
        ("layer00_head00", {"q_abs_mean": np.float32(3)}, "are no vectors"),
        ("layer00_head00", {"q_abs_mean": np.zeros((3, 1))}, "are no vectors"),
        ("layer00_head00", {"q_mean_imag": "three"}, "are no vectors"),
        ("layer01_head02", {"q_mean_imag": np.zeros(4)}, "'layer01_head02' whose vectors have not 3 numbers"),
        ("layer01_head02", {"q_mean_imag": np.asarray([1, np.nan, 2])}, "hold numbers that are not finite"),
        ("layer02_head00", {}, "belong to another model: 3 layers of 4 query heads of size 6; this model has 2 of 4"),
        ("layer00_head99", {}, "belong to another model: 2 layers of 100 query heads"),
    ],
)
def test_entries_that_are_none(monkeypatch, name, entry, message):
    table = entries()
    whole = {**table["layer00_head00"], **entry} if isinstance(entry, dict) and "q_mean_real" not in entry else entry
    assert message in refusal(monkeypatch, {"stats": {**table, name: whole}})


def test_a_missing_head(monkeypatch):
    table = entries()
    del table["layer01_head01"]
    assert "belong to another model" in refusal(monkeypatch, {"stats": table})
