"""Parameters through orbax, onto one device and onto a mesh."""

import jax
import numpy as np
import pytest

import models
from kvjax.errors import UserError
from kvjax.sharding import make_mesh


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


def test_orbax_restores_onto_the_default_device(single, tmp_path):
    model = models.load_model(single)
    models.save_params(model, tmp_path / "orbax")
    with jax.default_device(jax.devices()[3]):
        there = models.restore_params(model, tmp_path / "orbax")
    assert {one for array in jax.tree.leaves(there) for one in array.devices()} == {jax.devices()[3]}


def test_orbax_refuses_another_model_and_a_missing_folder(folder, single, tmp_path):
    models.save_params(models.load_model(single), tmp_path / "orbax")
    with pytest.raises(UserError, match="does not hold this model"):
        models.restore_params(models.load_model(folder), tmp_path / "orbax")
    with pytest.raises(UserError, match="no checkpoint folder"):
        models.restore_params(models.load_model(folder), tmp_path / "nowhere")
