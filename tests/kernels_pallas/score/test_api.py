"""The choice of an implementation, and keys over a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.score import IMPLEMENTATIONS, StoredKeys, api, chosen_implementation, mosaic_tpu, score, window_mass
from kernels_pallas.score.api import choose
from tests.kernels_pallas.decode_attention.parts import of_bits
from tests.kernels_pallas.score.given import assert_close, given, rotation

AUTO = (jax.sharding.AxisType.Auto,) * 2


def test_a_named_implementation_equals_the_automatic_one():
    keys, rows, weights = given(of_bits(4), slots=64)
    named = score(keys, rows=rows, weights=weights, implementation="reference")
    np.testing.assert_array_equal(named, score(keys, rows=rows, weights=weights))
    assert named.shape == (1, 8, 64)
    assert (np.asarray(named)[:, :, np.asarray(keys.positions)[0, 0] < 0] == 0).all()


def test_nothing_to_score_by_is_an_error():
    keys, *_ = given(of_bits(4), slots=64)
    with pytest.raises(ValueError, match="score wants rows, or weights, or both"):
        score(keys)


def test_an_implementation_that_is_unknown_or_cannot_serve_is_refused():
    keys, rows, _ = given(of_bits(4), slots=64)
    with pytest.raises(ValueError, match="no implementation 'cuda': give one of mosaic_tpu, triton_gpu, reference"):
        score(keys, rows=rows, implementation="cuda")
    with pytest.raises(ValueError, match="score: mosaic_tpu cannot serve this: it runs on TPUs, and this is cpu"):
        score(keys, rows=rows, implementation="mosaic_tpu")
    choice = choose(keys, 8)
    reasons = "mosaic_tpu: it runs on TPUs, and this is cpu", "triton_gpu: it runs on NVIDIA GPUs, and this is cpu"
    assert (choice.name, choice.reasons) == ("reference", reasons)
    assert chosen_implementation() == "reference"
    assert chosen_implementation() in IMPLEMENTATIONS


def test_with_several_devices_the_kernel_wants_the_mesh(monkeypatch):
    """Without it nobody could say how the arrays lie, and the compiler spreads only the reference."""
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda *facts: None)
    keys, *_ = given(of_bits(4), slots=64)
    choice = choose(keys, 8)
    assert (choice.name, choice.reasons[0]) == ("reference", "mosaic_tpu: the mesh over 8 devices is not given")
    mesh = jax.make_mesh((2, 1), ("data", "model"), axis_types=AUTO)
    assert choose(keys, 8, mesh=mesh).name == "mosaic_tpu"
    assert choose(keys, 8, implementation="mosaic_tpu").name == "mosaic_tpu"


@pytest.mark.parametrize("name", ["mosaic_tpu", "triton_gpu"])
@pytest.mark.parametrize(
    "changes",
    [
        {"basis": rotation(32, 32), "own": True},
        {"basis": rotation(2, 2, 32, 32), "mean": (2, 2, 32)},
        {"stored": 1, "heads": 2, "pool": True},
    ],
)
def test_over_a_mesh_each_device_runs_it_on_what_it_has(changes, name):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=AUTO)
    keys, rows, weights = given(of_bits(4), **{"batch": 2, "slots": 256} | changes)
    ours = api._over_mesh(name, keys, rows, weights, mesh, interpret=True)
    assert_close(ours, score(keys, rows=rows, weights=weights, implementation="reference"), 5e-3)


def test_shapes_are_enough_to_choose():
    keys, *_ = given(of_bits(4))
    shapes = jax.eval_shape(lambda: keys)
    assert choose(shapes, 8).name == "reference"
    wide = dataclasses.replace(shapes, positions=jax.ShapeDtypeStruct((1, 1, 512), jnp.int32))
    assert mosaic_tpu.unsupported(wide, 8, "TPU v6 lite") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"basis": rotation(2, 32, 32), "mean": (2, 32), "own": True, "batch": 2},
        {"pool": True, "heads": 4, "stored": 1},
    ],
)
def test_the_weights_of_a_window_are_those_of_a_softmax_over_all_pieces(changes):
    """Of keys as they are read, in float64; the last query is none."""
    first, rows, _ = given(of_bits(4), slots=64, **changes)
    batch, heads = rows.shape[0], first.num_kv_heads
    generator = np.random.default_rng(3)
    plain = jnp.asarray(generator.normal(size=(batch, heads, 8, 32)), jnp.float32)
    other = StoredKeys.of_array(plain, jnp.broadcast_to(jnp.arange(64, 72, dtype=jnp.int32), (batch, 1, 8)))
    queries = jnp.asarray(generator.normal(size=(batch, 3, rows.shape[1], 32)), jnp.float32)
    query_positions = jnp.tile(jnp.asarray([[40, 70, -1]], jnp.int32), (batch, 1))
    found = window_mass((first, other), queries, query_positions=query_positions, scale=0.2)
    keys = np.nan_to_num(np.concatenate([np.asarray(piece.read(), np.float64) for piece in (first, other)], axis=2))
    held, slots = (
        [np.broadcast_to(piece.held(), (batch, heads, piece.positions.shape[2])) for piece in (first, other)],
        72,
    )
    places = [np.broadcast_to(piece.positions, one.shape) for piece, one in zip((first, other), held, strict=True)]
    held, places = np.concatenate(held, axis=2), np.concatenate(places, axis=2)
    group, wanted = rows.shape[1] // heads, np.zeros((batch, heads, slots))
    for row, token, head in np.ndindex(batch, 2, rows.shape[1]):
        own = head // group
        seen = held[row, own] & (places[row, own] <= int(query_positions[row, token]))
        logits = keys[row, own] @ np.asarray(queries[row, token, head], np.float64) * 0.2
        weights = np.where(seen, np.exp(logits - logits[seen].max()), 0.0)
        wanted[row, own] += weights / weights.sum() / group
    np.testing.assert_allclose(np.concatenate(found, axis=2), wanted, atol=1e-5)
