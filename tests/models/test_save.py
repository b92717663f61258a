"""Checkpoint folders that we write are read by us, and have the names that transformers gives."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file

import models


def test_a_saved_model_loads_as_it_was_and_has_the_names_of_transformers(golden, tmp_path):
    folder = golden / "transformers" / "llama_biased"
    model = models.load_model(folder)
    models.save_checkpoint(model, tmp_path)
    again = models.load_model(tmp_path)
    assert again.config == model.config
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    theirs, ours = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    written = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((folder / "config.json").read_text())
    shared = written.keys() & published.keys()
    assert {name: written[name] for name in shared} == {name: published[name] for name in shared}
