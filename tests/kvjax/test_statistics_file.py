"""Files of statistics: what is saved is loaded, whole files only, and only for the model that they belong to."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kvjax import statistics_file
from kvjax.errors import UserError
from kvjax.rope import YarnScaling
from kvjax.statistics import Statistics, empty_statistics
from kvjax.statistics_file import load_statistics, save_statistics
from tests.tiny import tiny_config

SHAPE = tiny_config().cache_shape("float32")


def random_statistics(heads=1):
    """Statistics whose arrays hold random numbers."""
    generator = np.random.default_rng(0)
    layers = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), empty_statistics(SHAPE, heads=heads)
    )
    return Statistics(layers, SHAPE, about={"text": "Möbius.txt", "tokens": 5})


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "new" / "statistics.safetensors"
    save_statistics(path, random_statistics())
    return path


def refusal(path, shape=SHAPE):
    """The message of a refusal, which is one line and says what writes such files."""
    with pytest.raises(UserError) as caught:
        load_statistics(path, shape)
    message = str(caught.value)
    assert "\n" not in message
    assert "python -m kvjax.calibrate" in message
    return message


@pytest.mark.parametrize("heads", [1, 2])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, heads):
    before = random_statistics(heads)
    save_statistics(tmp_path / "statistics.safetensors", before)
    after = load_statistics(tmp_path / "statistics.safetensors", SHAPE)
    assert jax.tree.structure(after.layers) == jax.tree.structure(before.layers)
    for ours, theirs in zip(jax.tree.leaves(after.layers), jax.tree.leaves(before.layers), strict=True):
        assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
        np.testing.assert_array_equal(ours, theirs)
    assert (after.shape, after.about) == (SHAPE, before.about)
    assert after.source == str(tmp_path / "statistics.safetensors")


def test_a_file_serves_the_model_in_another_dtype(saved):
    """The same checkpoint is calibrated in one dtype and decoded in another."""
    assert load_statistics(str(saved), dataclasses.replace(SHAPE, dtype="bfloat16")).shape.dtype == "float32"


def test_files_are_written_whole_or_not_at_all(saved, monkeypatch):
    """A new file takes the old one's place; a write that fails leaves the old one, and no other file."""
    save_statistics(saved, dataclasses.replace(random_statistics(), about={"tokens": 7}))
    assert load_statistics(saved, SHAPE).about == {"tokens": 7}
    assert list(saved.parent.iterdir()) == [saved]
    before = saved.read_bytes()

    def fail(arrays, path, **rest):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(statistics_file, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_statistics(saved, random_statistics(heads=2))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file(tmp_path):
    assert "There is no statistics file" in refusal(tmp_path / "none.safetensors")
    assert "There is no statistics file" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"a diary, not statistics", b"\xff" * 64], ids=["empty", "text", "bytes"])
def test_no_safetensors(tmp_path, content):
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    assert "diary.txt is not a safetensors file" in refusal(path)


def test_a_file_cut_short(saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    assert "is not a safetensors file" in refusal(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_of_another_kind(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"embedding": np.zeros((4, 4), np.float32)}, path, metadata=metadata)
    assert "holds no statistics of ours" in refusal(path)


@pytest.mark.parametrize("number", ["1", "3", "10", "", "2.1"])
def test_a_file_of_another_format(saved, number):
    """By its number alone: what such a file lacks is never looked for."""
    with safe_open(saved, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    lacking = {name: array for name, array in arrays.items() if not name.endswith("queries.second")}
    save_file(lacking, saved, metadata=metadata | {"format": f"kvjax statistics {number}"})
    message = refusal(saved)
    assert f"The format of {saved} is 'kvjax statistics {number}'; this version reads 'kvjax statistics 2'" in message
    assert f"python -m kvjax.calibrate --output={saved}" in message


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_kv_heads": 4}, "num_kv_heads is 2, the model's is 4"),
        ({"head_size": 32}, "head_size is 16, the model's is 32"),
        ({"num_layers": 3}, "num_layers is 2, the model's is 3"),
        ({"num_query_heads": 8}, "num_query_heads is 4, the model's is 8"),
    ],
)
def test_a_model_of_other_dimensions(saved, changes, name):
    message = refusal(saved, dataclasses.replace(SHAPE, **changes))
    assert f"{saved} belong to another model" in message
    assert name in message


@pytest.mark.parametrize("changes", [{"theta": 1e6}, {"scaling": YarnScaling(factor=4.0, original_max_positions=128)}])
def test_a_model_of_another_rotation(saved, changes):
    other = dataclasses.replace(SHAPE.rope, **changes)
    message = refusal(saved, dataclasses.replace(SHAPE, rope=other))
    assert f"their rope is {SHAPE.rope!r}, the model's is {other!r}" in message


def test_another_config_of_the_same_dimensions(saved):
    """By the hash of the config, whatever field differs."""
    config = dataclasses.replace(tiny_config(), norm_epsilon=1e-5)
    message = refusal(saved, config.cache_shape("float32"))
    assert f"config (its hash) is {SHAPE.fingerprint}, the model's is {config.fingerprint()}" in message


def test_published_statistics_of_triattention(tmp_path, shared_data):
    """A `.pt` file is read as one of theirs, for a model of its shape."""
    path = shared_data / "triattention-stats" / "ds_qwen7b.aime24.pt"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the tree")
    shape = dataclasses.replace(SHAPE, num_layers=28, num_query_heads=28, num_kv_heads=4, head_size=128)
    statistics = load_statistics(path, shape)
    assert statistics.source == str(path)
    assert [layer.queries.mean.shape for layer in statistics.layers] == [(28, 128)] * 28
    assert "28 layers of 28 query heads of size 128; this model has 2" in refusal(path)
    assert "There is no statistics file" in refusal(tmp_path / "none.pt")


def test_a_pt_file_of_another_kind(tmp_path):
    (tmp_path / "diary.pt").write_bytes(b"a diary, not statistics")
    with pytest.raises(UserError, match="diary.pt cannot be read as tensors") as caught:
        load_statistics(tmp_path / "diary.pt", SHAPE)
    assert "\n" not in str(caught.value)
