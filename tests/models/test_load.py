"""Loading: sharded and whole, every dtype, and each broken file named in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax
import models
from kvjax.errors import UserError
from kvjax.sharding import make_mesh
from tests.tiny import tiny_config


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


def test_a_folder_that_is_not_there_or_is_a_file(single):
    with pytest.raises(UserError, match="There is no checkpoint folder '/no such folder'"):
        models.load_model("/no such folder")
    with pytest.raises(UserError, match="is a file; give the folder"):
        models.load_model(single / "config.json")


def test_a_hub_name_is_downloaded_or_the_way_out_is_named(monkeypatch, golden):
    import types

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="needs huggingface_hub: pip install"):
        models.load_model("some/model")
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns))
        if name == "some/secret":
            raise OSError("401 Client Error.\nmore")
        return str(golden / "transformers" / "llama2")

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert models.load_model("some/model").config.model_type == "llama"
    with pytest.raises(UserError, match="downloading it failed: 401 Client Error. Check the name"):
        models.load_model("some/secret")
    with pytest.raises(UserError, match="tokenizer.json"):
        kvjax.load_tokenizer("some/model")
    assert asked == [("some/model", True), ("some/secret", True), ("some/model", False)]


LOAD = """
import resource, sys
import jax, models

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jax.devices()
before = peak()
model = models.load_model(sys.argv[1])
print(sum(leaf.nbytes for leaf in jax.tree.leaves(model)), peak() - before)
"""


@pytest.mark.slow
def test_host_memory_holds_the_model_once(tmp_path):
    """On a CPU the model itself is in host memory; beside it there is room for about one tensor."""
    config = tiny_config(layers=8, width=512, feed_forward=4096, vocab_size=512)
    models.save_checkpoint(models.Transformer(config), tmp_path)
    environment = dict(os.environ, PYTHONPATH=str(Path(models.__file__).parent.parent), XLA_FLAGS="")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    model_bytes, added = map(int, done.stdout.split())
    assert model_bytes > 100e6
    assert added < 1.5 * model_bytes
