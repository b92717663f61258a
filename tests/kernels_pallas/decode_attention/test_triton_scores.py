"""What queries and keys give, before anything is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.decode_attention import triton_scores
from kernels_pallas.decode_attention.triton_read import Reader, Slots, groups_of_all
from tests.kernels_pallas.decode_attention.gpu_cases import made


def scores(segment, query_positions, *, size):
    """Of each row of slots, each of its two tokens and the rows of queries in blocks of `size`, for the first head."""
    heads, groups = segment.keys[0].num_heads * segment.queries.shape[0], groups_of_all(segment.keys)
    asked = triton_scores.asked_of(segment, query_positions, fields=2, heads=heads)
    count = segment.positions.shape[2]

    def kernel(asked, found):
        rows = triton_scores.rows_of(asked, pl.program_id(1) * size, size=size, groups=groups, scale=1.0)
        slots = Slots(jnp.int32(0), count // 2, count // 2, 2)
        keys = [Reader(asked.keys[0], groups[0], None, slots=slots, interpret=True)]
        for index in range(2):
            found[:, index] = triton_scores.scores_of(keys, triton_scores.field_of(index, slots, asked, rows), rows)

    blocks = -(-asked.queries.shape[1] // size)
    return pl.pallas_call(
        kernel,
        grid=(heads, blocks),
        in_specs=[triton_scores.specs_of(asked, heads, axis=0)],
        out_specs=pl.BlockSpec((None, count // 2, 2, size), lambda head, block: (head, 0, 0, block)),
        out_shape=jax.ShapeDtypeStruct((heads, count // 2, 2, blocks * size), jnp.float32),
        interpret=True,
    )(asked)


def test_scores_are_products_where_a_slot_is_seen_and_far_below_elsewhere():
    """Three rows of queries in blocks of two; even and odd channels of keys and queries belong together."""
    segment, positions = made("int4", "float32", batch=1, group=3, slots=64)
    found = np.asarray(scores(segment, positions, size=2)).reshape(2, 64, 4)
    keys = np.nan_to_num(np.asarray(segment.keys[0].read()))[0]  # k S R
    queries = np.asarray(segment.queries, np.float32)[0, 0].reshape(2, 3, 64)
    seen = np.asarray((segment.positions >= 0) & (segment.positions <= positions[0, 0]))[0, 0]
    expected = np.einsum("ksr,kqr->ksq", keys, queries)
    np.testing.assert_allclose(found[:, seen, :3], expected[:, seen], atol=2e-3 * np.abs(expected).max())
    assert (found[:, ~seen] < -1e20).all()


def test_the_row_behind_the_last_one_is_nobodys():
    segment, positions = made("float32", batch=1, group=3, tokens=2, slots=64)
    asked = triton_scores.asked_of(segment, positions, fields=1, heads=2)
    one = jax.tree.map(lambda array: array[0], asked)
    rows = triton_scores.rows_of(one, 4, size=4, groups=groups_of_all(segment.keys), scale=1.0)
    assert rows.inside.tolist() == [True, True, False, False]
    assert rows.positions.tolist() == [*positions[0].tolist(), -1, -1]
    assert rows.where.tolist() == [4, 5, 5, 5]
