"""The definition against a loop over keys in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Rotated
from kernels_pallas.score import StoredKeys, reference
from tests.kernels_pallas.decode_attention.parts import FORMS, of_bits, of_floats
from tests.kernels_pallas.score.given import assert_close, given, rotation, written_out

SMALL = {"size": 8, "slots": 64, "group": 2}


@pytest.mark.parametrize(
    ("maker", "changes"),
    [
        (of_floats("float32"), {"batch": 2, "own": True}),
        (of_floats("bfloat16"), {"basis": rotation(8, 8)}),
        (of_bits(4), {"basis": rotation(2, 8, 8), "mean": (2, 8), "batch": 2}),
        (of_bits(3), {"basis": rotation(2, 2, 8, 8), "mean": (2, 2, 8), "batch": 2}),
        (of_bits(4), {"basis": rotation(8, 8)[:, :6], "size": 6}),
        (of_bits(4, **FORMS["by channel"]), {"mean": (2, 8)}),
        (of_bits(4), {"stored": 1, "heads": 2, "basis": rotation(2, 8, 8)}),
        (of_bits(4), {"stored": 1, "heads": 4, "basis": rotation(8, 8), "pool": True}),
    ],
)
@pytest.mark.parametrize("terms", ["both", "rows", "weights"])
def test_equals_the_formula(maker, changes, terms):
    keys, rows, weights = given(maker, **SMALL | changes)
    rows, weights = None if terms == "weights" else rows, None if terms == "rows" else weights
    assert_close(reference.score(keys, rows=rows, weights=weights), written_out(keys, rows, weights), 2e-6)


def test_keys_from_before_rope_are_turned():
    keys, rows, weights = given(of_floats("float32"), **SMALL)
    turned = Rotated(parts=keys.parts, basis=None, mean=None, frequencies=(1.0, 0.5, 0.2, 0.01))
    stored = dataclasses.replace(keys, parts=(turned,))
    assert stored.turned
    assert not keys.turned
    read = jnp.nan_to_num(turned.read(keys.positions))
    plain = StoredKeys.of_array(read, keys.positions)
    assert_close(
        reference.score(stored, rows=rows, weights=weights), reference.score(plain, rows=rows, weights=weights), 1e-6
    )


def test_keys_are_read_back_for_every_head():
    keys, *_ = given(of_floats("float32"), **SMALL, stored=1, heads=4, basis=rotation(4, 8, 8), mean=(4, 8))
    read, numbers = np.asarray(keys.read()), np.asarray(keys.parts[0].planes[0])
    held = np.asarray(keys.positions)[0, 0] >= 0
    for head in range(4):
        wanted = numbers[0, 0, held] @ np.asarray(keys.basis)[head].T + np.asarray(keys.mean)[head]
        np.testing.assert_allclose(read[0, head, held], wanted, atol=1e-5)


def test_rows_for_what_is_stored_give_the_same_products():
    keys, rows, _ = given(of_floats("float32"), **SMALL, batch=2, basis=rotation(2, 8, 8), mean=(2, 8))
    stored, bias = keys.for_stored(rows)
    numbers = np.repeat(np.asarray(keys.parts[0].read()), 2, axis=1)
    products = np.einsum("bnd,bnsd->bns", stored, numbers) + np.asarray(bias)[..., None]
    wanted = np.einsum("bnd,bnsd->bns", rows, np.repeat(np.asarray(keys.read()), 2, axis=1))
    np.testing.assert_allclose(products, wanted, atol=1e-4)


def test_slots_are_held_by_all_heads_or_by_their_owner():
    keys, *_ = given(of_floats("float32"), **SMALL, stored=1, heads=4, pool=True)
    held = np.asarray(keys.held())
    assert held.shape == (1, 4, 64)
    np.testing.assert_array_equal(held.sum(axis=1), np.asarray(keys.positions)[:, 0] >= 0)
    shared = dataclasses.replace(keys, owners=None)
    np.testing.assert_array_equal(shared.held(), np.asarray(keys.positions) >= 0)
