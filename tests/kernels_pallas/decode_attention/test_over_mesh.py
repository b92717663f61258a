"""What each device gets of a segment, with the reference in the kernel's place."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_attention import Segment, reference
from kernels_pallas.decode_attention.over_mesh import over_mesh


def segment_of(batch, heads, *, own):
    generator = np.random.default_rng(0)
    numbers = [jnp.asarray(generator.normal(size=(batch, heads, 32, 16)), jnp.float32) for _ in range(2)]
    queries = jnp.asarray(generator.normal(size=(batch, 1, 2 * heads, 16)), jnp.float32)
    made = Segment.of_arrays(queries, numbers[0], values=numbers[1], positions=jnp.tile(jnp.arange(32), (batch, 1)))
    if not own:
        return made
    positions = jnp.asarray(generator.integers(-1, 32, (batch, heads, 32)), jnp.int32)
    bias = jnp.asarray(generator.normal(size=(batch, 1, 2 * heads)), jnp.float32)
    return Segment(
        queries=queries, keys=made.keys, values=made.values, positions=positions, bias=bias, num_kv_heads=heads
    )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("batch", "heads", "spread"), [(4, 2, (2, 1)), (1, 4, (1, 2)), (3, 3, (3, 3))])
def test_each_device_runs_on_what_it_has_and_on_all_where_nothing_divides(batch, heads, spread, own):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    segment, newest = segment_of(batch, heads, own=own), jnp.full((batch, 1), 20, jnp.int32)
    seen = []

    def function(part, query_positions):
        seen.append((query_positions.shape[0], part.num_kv_heads))
        assert part.queries.shape[2] == 2 * part.keys[0].num_heads == 2 * part.num_kv_heads
        return reference.walk(part, query_positions, 0.25)

    ours = over_mesh(function, segment, newest, mesh)
    assert set(seen) == {spread}
    for one, other in zip(ours, reference.walk(segment, newest, 0.25), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_number_of_heads_may_be_left_out():
    mesh = jax.make_mesh((1, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    segment, newest = dataclasses.replace(segment_of(1, 2, own=False), num_kv_heads=None), jnp.full((1, 1), 20)
    ours = over_mesh(lambda part, positions: reference.walk(part, positions, 0.25), segment, newest, mesh)
    for one, other in zip(ours, reference.walk(segment, newest, 0.25), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_one_device_gets_the_arrays_themselves():
    segment, newest = segment_of(1, 1, own=True), jnp.zeros((1, 1), jnp.int32)
    given = []

    def function(*arguments):
        given.extend(arguments)
        return reference.walk(*arguments, 0.25)

    over_mesh(function, segment, newest, None)
    for field in dataclasses.fields(segment):
        assert getattr(given[0], field.name) is getattr(segment, field.name)
    assert given[1] is newest
