"""How a part is cut for the GPU kernel, and what its arrays look like then."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded
from kernels_pallas.decode_attention import triton_read
from kernels_pallas.decode_attention.triton_read import groups_of, groups_of_all, in_fields, in_words
from tests.kernels_pallas.decode_attention.gpu_cases import made


def part_of(kind, **changes):
    return made(kind, slots=64, **changes)[0].keys[0]


def pieces(part):
    """Of each group: elements, places and parities."""
    return [[tuple(piece) for piece in group] for group in groups_of(part)]


def channels(*parts):
    """Of all pieces, in their order."""
    found = [piece.where for groups in groups_of_all(parts) for group in groups for piece in group]
    return [channel for where in found for channel in range(10_000)[where.start :: where.stride][: where.size]]


def test_vectors_are_cut_into_powers_of_two():
    assert pieces(part_of("bfloat16", size=80)) == [[(0, 64, 0, None), (64, 16, 64, None)]]
    wide = pieces(part_of("bfloat16", size=576, stored=1))
    assert [piece[:2] for piece in wide[0]] == [*((128 * index, 128) for index in range(4)), (512, 64)]


def test_codes_are_cut_into_even_and_odd_channels_of_each_group():
    part = part_of("group4")
    assert pieces(part) == [[(0, 16, 0, 0), (0, 16, 1, 1)], [(16, 16, 32, 0), (16, 16, 33, 1)]]
    assert channels(part) == [*range(0, 32, 2), *range(1, 32, 2), *range(32, 64, 2), *range(33, 64, 2)]
    wide = part_of("int4", size=256)
    assert [piece[:2] for piece in pieces(wide)[0]] == [(0, 64), (0, 64), (64, 64), (64, 64)]
    assert sorted(channels(wide)) == list(range(256))


def test_parts_have_places_behind_each_other():
    parts = part_of("int4"), part_of("bfloat16")
    assert [piece.place for groups in groups_of_all(parts) for group in groups for piece in group] == [0, 1, 64]
    assert channels(*parts) == [*range(0, 64, 2), *range(1, 64, 2), *range(64, 128)]


@pytest.mark.parametrize("kind", ["int4", "table4", "float8_e4m3fn"])
def test_halves_of_fewer_channels_than_a_product_takes_are_not_cut(kind):
    part = part_of(kind, size=80)
    assert not in_words(part)
    assert pieces(part) == [[(0, 64, 0, None), (64, 16, 64, None)]]
    assert in_words(part_of(kind, size=96))


def test_in_fields_nothing_is_moved():
    """Bytes and scales lie as they lay; what shares 16 or 32 bits is one element."""
    part = part_of("int4")
    laid = in_fields(part, 2)
    assert laid.planes[0].shape == (4, 32, 1, 32)
    assert laid.planes[0].dtype == jnp.int16
    assert laid.scale.shape == (4, 32, 1)
    assert laid.scale.dtype == jnp.int32
    for ours, theirs in ((laid.planes[0], part.planes[0]), (laid.scale, part.scale)):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_all_bytes_of_eight_bit_floats_are_read():
    """Not in pairs of channels; subnormal numbers and zeros of both signs too, and NaN is not looked at."""
    bytes_ = jnp.arange(-128, 128, dtype=jnp.int32).astype(jnp.int8).reshape(1, 1, 16, 16)
    for name in ("float8_e4m3fn", "float8_e5m2"):
        part = Coded(planes=(bytes_,), dtype=name)
        assert not in_words(part)
        expected = np.asarray(bytes_[0, 0].view(name).astype(jnp.float32))
        laid, (group,) = in_fields(part, 1), groups_of(part)
        slots = triton_read.Slots(jnp.int32(0), 16, 16, 1)
        reader = triton_read.Reader(laid, (group,), None, slots=slots, interpret=True)
        reader._hold((0, 0, 0, 16), functools.partial(jnp.squeeze, laid.planes[0], (0, 2)))
        field = triton_read.Field(0, jnp.ones((16, 1), bool), jnp.ones((16,), bool))
        found = np.asarray(reader.numbers(field, group[0]).astype(jnp.float32))
        counts = ~np.isnan(expected)
        assert counts.sum() >= 250
        np.testing.assert_array_equal(found[counts], expected[counts])


def test_tables_are_gathered_only_where_channels_are_not_paired():
    levels = tuple(map(float, range(32)))
    many = Coded(
        planes=(jnp.zeros((1, 1, 32, 64), jnp.int8), jnp.zeros((1, 1, 8, 64), jnp.int8)), bits=5, levels=levels
    )
    assert triton_read.table_of(part_of("table4")) is None
    assert triton_read.table_of(many).tolist() == [[*range(16, 32), *range(16)]]
