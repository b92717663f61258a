"""Meshes of eight fake CPU devices give the logits of one device; the table of axes; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import kvjax
from kvjax.errors import UserError
from kvjax.sharding import Placement, make_mesh
from tests.tiny import place, tiny_model

MESHES = [(1, 8), (2, 4), (8, 1)]
HEADS = {"divide": (16, 8), "share": (8, 4), "neither": (6, 3)}  # N, K
TOLERANCE = 1e-5


def run(model, prompts, lengths):
    cache = kvjax.init_cache(model, batch=8, max_tokens=24)
    outputs = []
    logits, cache = kvjax.prefill(model, cache, prompts, lengths=lengths)
    outputs.append(np.asarray(logits))
    for step in range(3):
        logits, cache = kvjax.compressed_decode(model, cache, jnp.full((8, 1), step, jnp.int32))
        outputs.append(np.asarray(logits)[:, 0])
    return np.stack(outputs), cache


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("data", "model_chips"), MESHES)
def test_meshes_give_the_logits_of_one_device(heads, data, model_chips):
    num_query_heads, num_kv_heads = HEADS[heads]
    single = tiny_model(num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    prompts = jnp.asarray(np.random.default_rng(0).integers(0, 64, (8, 16)))
    lengths = jnp.asarray([16, 3, 9, 1, 12, 7, 16, 5])
    expected, _ = run(single, prompts, lengths)
    mesh = make_mesh(data=data, model=model_chips)
    outputs, cache = run(place(single, mesh), prompts, lengths)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    keys = cache.layers[0].exact.keys
    spread = data * (model_chips if num_kv_heads % model_chips == 0 else 1)
    assert keys.sharding.shard_shape(keys.shape)[0] * data == 8
    assert kvjax.device_bytes(keys) == keys.nbytes * 8 // spread


def test_generation_on_a_mesh_equals_one_device():
    single = tiny_model(num_query_heads=16, num_kv_heads=8)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 3, [12]]
    expected = kvjax.generate(single, prompts, max_new_tokens=12)
    meshed = place(single, make_mesh(data=2, model=4))
    assert kvjax.generate(meshed, prompts, max_new_tokens=12) == expected


@pytest.mark.parametrize("named", ["device", "platform"])
def test_without_a_mesh_all_is_on_the_default_device(named):
    there = {"device": jax.devices()[3], "platform": "cpu"}[named]
    with jax.default_device(there):
        device = jax.devices()[0] if named == "platform" else there
        assert Placement().device == device
        model = jax.device_put(tiny_model(), device)
        cache = kvjax.init_cache(model, "int8", batch=1, max_tokens=24)
        logits, cache = kvjax.prefill(model, cache, jnp.asarray([[1, 2, 3]]))
        assert {one for array in jax.tree.leaves((logits, cache)) for one in array.devices()} == {device}


def test_the_table_of_axes():
    placement = Placement(make_mesh(data=2, model=4))
    assert placement.spec("B K S D", (4, 8, 100, 64)) == P("data", "model", None, None)
    assert placement.spec("B K S D", (3, 2, 100, 64)) == P(None, None, None, None)  # neither divides
    assert placement.spec("M N D", (64, 8, 16)) == P(None, "model", None)
    assert placement.spec("V M", (100, 64)) == P("model", None)
    assert Placement().spec("V M", (100, 64)) == P()
    assert Placement().sharding("V M", (100, 64)) is None


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh(data=2, model=-1).shape) == {"data": 2, "model": 4}
    assert dict(make_mesh(data=1, model=2).shape) == {"data": 1, "model": 2}


@pytest.mark.parametrize(("data", "model"), [(3, 3), (0, 1), (-1, -1), (-1, 16)])
def test_a_mesh_that_does_not_fit_is_refused(data, model):
    with pytest.raises(UserError, match=f"data={data}, model={model} does not fit on 8 device"):
        make_mesh(data=data, model=model)


def test_eight_devices_are_there():
    assert len(jax.devices()) == 8
