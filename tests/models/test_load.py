"""Loading: sharded and whole, every dtype, and each broken file named in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from kvjax.errors import UserError
from kvjax.sharding import make_mesh


@pytest.fixture
def folder(golden, tmp_path):
    """A copy of the three-file checkpoint."""
    return shutil.copytree(golden / "transformers" / "qwen3", tmp_path / "qwen3")


@pytest.fixture
def single(golden, tmp_path):
    """A copy of a one-file checkpoint."""
    return shutil.copytree(golden / "transformers" / "llama2", tmp_path / "llama2")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.mark.parametrize(("data", "model"), [(1, 8), (2, 4), (8, 1)])
@pytest.mark.parametrize("name", ["qwen3", "llama_biased", "llama32_tied", "mistral"])
def test_a_mesh_loads_the_same_weights(golden, name, data, model):
    whole = models.load_model(golden / "transformers" / name)
    spread = models.load_model(golden / "transformers" / name, mesh=make_mesh(data=data, model=model))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(spread.layers[0].feed_forward.gate.kernel[...].sharding.device_set) == 8
    gate = spread.layers[0].feed_forward.gate.kernel[...]
    assert gate.sharding.shard_shape(gate.shape)[1] == gate.shape[1] // model


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_each_stored_dtype_loads_as_itself_and_as_asked(single, stored):
    weights = {name: value.astype(stored) for name, value in load_file(single / "model.safetensors").items()}
    save_file(weights, single / "model.safetensors")
    edit_json(single / "config.json", dtype=stored)
    assert models.load_model(single).embedding[...].dtype == jnp.dtype(stored)
    cast = models.load_model(single, dtype="float32")
    expected = weights["model.embed_tokens.weight"].astype("float32")
    np.testing.assert_array_equal(cast.embedding[...], expected)


def test_saving_and_loading_gives_the_same_model(single, tmp_path):
    model = models.load_model(single)
    models.save_checkpoint(model, tmp_path / "again")
    again = models.load_model(tmp_path / "again")
    assert again.config == model.config
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


def test_orbax_saves_and_restores_also_onto_a_mesh(folder, tmp_path):
    model = models.load_model(folder)
    models.save_params(model, tmp_path / "orbax")
    blank = models.Transformer(model.config, dtype="bfloat16")
    mesh = make_mesh(data=2, model=4)
    for target in (blank, models.abstract_model(model.config), models.abstract_model(model.config, mesh=mesh)):
        restored = models.restore_params(target, tmp_path / "orbax")
        for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(restored), strict=True):
            np.testing.assert_array_equal(one, other)
    assert restored.embedding[...].sharding.shard_shape((64, 32)) == (16, 32)


def test_orbax_refuses_another_model_and_a_missing_folder(folder, single, tmp_path):
    models.save_params(models.load_model(single), tmp_path / "orbax")
    with pytest.raises(UserError, match="does not hold this model"):
        models.restore_params(models.load_model(folder), tmp_path / "orbax")
    with pytest.raises(UserError, match="no checkpoint folder"):
        models.restore_params(models.load_model(folder), tmp_path / "nowhere")


def test_a_missing_file_of_the_index(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 1 file\(s\) that are not there: model-00002-of-00003"):
        models.load_model(folder)


def test_no_weights_at_all(single):
    (single / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds neither model\.safetensors nor"):
        models.load_model(single)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.999])
def test_a_truncated_file(single, kept):
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or not a safetensors file"):
        models.load_model(single)


def test_a_missing_and_an_unknown_tensor(single):
    weights = load_file(single / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "layers.1.mlp.up" not in name}, single / "m")
    (single / "m").replace(single / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight' of shape \(48, 32"):
        models.load_model(single)
    save_file({**weights, "model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32)}, single / "m")
    (single / "m").replace(single / "model.safetensors")
    with pytest.raises(UserError, match=r"does not have, the first is 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        models.load_model(single)


def test_old_rotary_tensors_are_passed_over(single):
    weights = load_file(single / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file({**weights, **extra}, single / "model.safetensors")
    models.load_model(single)


def test_a_tensor_of_the_wrong_shape(single):
    edit_json(single / "config.json", intermediate_size=40)
    with pytest.raises(UserError, match=r"has shape \(32, 48\); config.json asks for \(32, 40\)"):
        models.load_model(single)


def test_fp8_tensors_are_refused(single):
    weights = load_file(single / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    header = {n: {"dtype": "BF16", "shape": list(w.shape)} for n, w in weights.items()}
    header[name]["dtype"] = "F8_E4M3"
    at = 0
    for n, w in weights.items():
        size = w.size * (1 if n == name else 2)
        header[n]["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header).encode()
    (single / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    with pytest.raises(UserError, match=r"up_proj.weight' has dtype F8_E4M3; expected one of F32, BF16, F16"):
        models.load_model(single)


def test_an_index_that_puts_a_tensor_into_the_wrong_file(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"puts the tensor 'model\.norm\.weight' into model-00001"):
        models.load_model(folder)


def test_a_folder_that_is_not_there_or_is_a_file(single):
    with pytest.raises(UserError, match="There is no checkpoint folder '/no such folder'"):
        models.load_model("/no such folder")
    with pytest.raises(UserError, match="is a file; give the folder"):
        models.load_model(single / "config.json")


def test_a_hub_name_is_downloaded_or_the_way_out_is_named(monkeypatch, golden):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: pip install"):
        models.load_model("some/model")
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name == "some/secret":
            raise OSError("401 Client Error.\nmore")
        return str(golden / "transformers" / "llama2")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert models.load_model("some/model").config.model_type == "llama"
    with pytest.raises(UserError, match="downloading it failed: 401 Client Error. Check the name"):
        models.load_model("some/secret")
    assert asked == ["some/model", "some/secret"]
