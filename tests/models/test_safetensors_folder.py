"""Broken folders of safetensors files, each named in one line."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import models
from kvjax.errors import UserError
from models.safetensors_folder import SafetensorsFolder


def test_parts_of_tensors_are_read(single):
    name = "model.layers.0.mlp.up_proj.weight"
    whole = load_file(single / "model.safetensors")[name]
    tensors = SafetensorsFolder(single)
    assert name in tensors.names()
    np.testing.assert_array_equal(tensors.read(name, (slice(8, 16), slice(0, 32))), whole[8:16])


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


def test_an_index_with_odd_values(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 5}}))
    with pytest.raises(UserError, match="has no weight_map from names of tensors to names of files"):
        models.load_model(folder)
