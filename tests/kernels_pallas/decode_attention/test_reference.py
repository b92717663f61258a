"""The reference against jax.nn.dot_product_attention and NumPy loops, on the inputs that break naive versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, pack
from kernels_pallas.decode_attention import Segment, decode_attention, reference
from kernels_pallas.decode_attention.reference import MASSES, block_slots_for
from tests.kernels_pallas.decode_attention.parts import FORMS, LEVELS, made, of_bits, of_floats, paged


def inputs(*, batch=2, tokens=1, slots=300, query_heads=4, kv_heads=2, head_size=16, seed=0):
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    return (
        normal(batch, tokens, query_heads, head_size),
        normal(batch, kv_heads, slots, head_size),
        normal(batch, kv_heads, slots, head_size),
    )


def attend(queries, keys, *, values, query_positions, key_positions, **rest):
    """One segment of plain arrays."""
    segment = Segment.of_arrays(queries, keys, values=values, positions=key_positions)
    scale = queries.shape[-1] ** -0.5
    (attended,) = decode_attention((segment,), query_positions=query_positions, scale=scale, **rest)
    return attended.output


def by_loops(queries, keys, values, query_positions, key_positions):
    """The formula, a query at a time, in float64."""
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    output = np.zeros(queries.shape)
    group = queries.shape[2] // keys.shape[1]
    for b, t, n in np.ndindex(queries.shape[:3]):
        seen = (key_positions[b] >= 0) & (key_positions[b] <= query_positions[b, t])
        if seen.any():
            scores = keys[b, n // group, seen] @ queries[b, t, n] / np.sqrt(queries.shape[-1])
            weights = np.exp(scores - scores.max())
            output[b, t, n] = weights @ values[b, n // group, seen] / weights.sum()
    return output


def assert_close(ours, expected, *, tolerance=2e-6):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-6))


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("slots", [1, 255, 256, 257, 700])
def test_equals_loops_for_shuffled_positions_and_holes(slots, tokens):
    """Slots in any order, a third of them empty, queries in the middle of the positions."""
    queries, keys, values = inputs(slots=slots, tokens=tokens)
    generator = np.random.default_rng(1)
    key_positions = np.stack([generator.permutation(slots) for _ in range(2)]).astype(np.int32)
    key_positions[generator.random((2, slots)) < 0.3] = -1
    query_positions = generator.integers(0, slots, (2, tokens)).astype(np.int32)
    ours = attend(
        queries,
        keys,
        values=values,
        query_positions=jnp.asarray(query_positions),
        key_positions=jnp.asarray(key_positions),
    )
    assert_close(ours, by_loops(queries, keys, values, query_positions, key_positions))


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_dot_product_attention(query_heads, kv_heads):
    queries, keys, values = inputs(slots=600, tokens=3, query_heads=query_heads, kv_heads=kv_heads)
    query_positions = jnp.asarray([[597, 598, 599], [10, 11, 12]])
    key_positions = jnp.broadcast_to(jnp.arange(600), (2, 600))
    ours = attend(queries, keys, values=values, query_positions=query_positions, key_positions=key_positions)
    mask = (key_positions[:, None, :] <= query_positions[:, :, None])[:, None]
    witness = jax.nn.dot_product_attention(queries, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), mask=mask)
    assert_close(ours, witness)


def test_a_sink_beside_thousands_of_near_uniform_tokens():
    """One slot of weight 0.99 over 8,192 others: the small weights must still count."""
    queries, keys, values = inputs(batch=1, slots=8193, query_heads=1, kv_heads=1)
    keys = keys * 0.01
    unit = queries[0, 0, 0] / jnp.linalg.norm(queries[0, 0, 0]) ** 2
    keys = keys.at[0, 0, 5].set(unit * 4 * np.log(99 * 8192))  # score ln(99 * 8192), so weight about 0.99
    where = np.arange(8193, dtype=np.int32)[None]
    newest = np.asarray([[8192]], np.int32)
    ours = attend(queries, keys, values=values, query_positions=jnp.asarray(newest), key_positions=jnp.asarray(where))
    # A score of 13.6 is rounded by 1e-6 in float32, and its exponential by 13.6 times as much, relatively.
    assert_close(ours, by_loops(queries, keys, values, newest, where), tolerance=1e-5)


def test_nan_in_empty_slots_changes_nothing():
    queries, keys, values = inputs(slots=520)
    positions = np.where(np.arange(520) % 3 == 0, np.arange(520), -1).astype(np.int32)[None].repeat(2, 0)
    empty = jnp.asarray(positions < 0)[:, None, :, None]
    arguments = {"query_positions": jnp.asarray([[400], [519]]), "key_positions": jnp.asarray(positions)}
    clean = attend(queries, keys, values=values, **arguments)
    dirty = attend(queries, jnp.where(empty, jnp.nan, keys), values=jnp.where(empty, jnp.nan, values), **arguments)
    np.testing.assert_array_equal(clean, dirty)


def test_a_query_that_sees_nothing_gets_zeros():
    queries, keys, values = inputs(tokens=2)
    positions = jnp.full((2, 300), -1)
    nothing = attend(
        queries, keys, values=values, query_positions=jnp.asarray([[3, -1], [3, 4]]), key_positions=positions
    )
    np.testing.assert_array_equal(nothing, np.zeros(queries.shape))


def test_low_precision_accumulates_in_float32():
    queries, keys, values = (array.astype(jnp.bfloat16) for array in inputs(slots=2000))
    positions = np.broadcast_to(np.arange(2000, dtype=np.int32), (2, 2000))
    newest = np.full((2, 1), 1999, np.int32)
    ours = attend(
        queries, keys, values=values, query_positions=jnp.asarray(newest), key_positions=jnp.asarray(positions)
    )
    assert ours.dtype == jnp.float32
    exact = by_loops(*(array.astype(jnp.float32) for array in (queries, keys, values)), newest, positions)
    np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=0, atol=2**-8 * np.abs(exact).max())


def test_segments_share_one_softmax():
    """Slots cut into two segments in any way give what one segment gives; weights add up to 1."""
    queries, keys, values = inputs(slots=600, tokens=3)
    positions = jnp.broadcast_to(jnp.arange(600), (2, 600))
    newest = jnp.asarray([[597, 598, 599], [10, 300, -1]])
    whole = attend(queries, keys, values=values, query_positions=newest, key_positions=positions)
    parts = [
        Segment.of_arrays(queries, keys[:, :, cut], values=values[:, :, cut], positions=positions[:, cut])
        for cut in (slice(430, 600), slice(0, 430))
    ]
    attended = decode_attention(tuple(parts), query_positions=newest, scale=0.25)
    assert_close(sum(one.output for one in attended), whole)
    weight = sum(one.weight for one in attended)
    np.testing.assert_allclose(weight, np.broadcast_to((newest >= 0)[..., None], weight.shape), atol=1e-6)


def test_codes_with_heads_shared_positions_apart_and_a_bias():
    """4-bit keys that two heads share, 2-bit values, positions of each head's own, against plain arrays."""
    generator = np.random.default_rng(3)
    slots, kv_heads = 520, 2
    queries = jnp.asarray(generator.normal(size=(2, 1, 4, 16)), jnp.float32)
    key_codes = generator.integers(-8, 8, (2, 1, slots, 16))
    value_codes = generator.integers(-2, 2, (2, kv_heads, slots, 16))
    scales = generator.uniform(0.05, 0.2, (2, 1, slots)).astype(np.float16)
    positions = np.where(generator.random((2, kv_heads, slots)) < 0.3, -1, np.arange(slots)).astype(np.int32)
    bias = generator.normal(size=(2, 1, 4)).astype(np.float32)
    segment = Segment(
        queries=queries,
        keys=(Coded(planes=pack(jnp.asarray(key_codes), 4), bits=4, scale=jnp.asarray(scales), shift=0.5),),
        values=(Coded(planes=pack(jnp.asarray(value_codes), 2), bits=2, levels=(-1.5, -0.5, 0.5, 1.0)),),
        positions=jnp.asarray(positions),
        bias=jnp.asarray(bias),
    )
    exact = Segment.of_arrays(
        queries, jnp.zeros((2, 2, 1, 16)), values=jnp.ones((2, 2, 1, 16)), positions=jnp.zeros((2, 1), jnp.int32)
    )
    coded, plain = decode_attention((segment, exact), query_positions=jnp.full((2, 1), slots), scale=0.3)
    keys = (key_codes + 0.5) * scales.astype(np.float64)[..., None]
    values = np.asarray([-1.5, -0.5, 0.5, 1.0])[value_codes + 2]
    for b, n in np.ndindex(2, 4):
        seen = positions[b, n // 2] >= 0
        scores = 0.3 * (keys[b, 0, seen] @ np.asarray(queries[b, 0, n], np.float64) + bias[b, 0, n])
        weights = np.exp(scores) / (np.exp(scores).sum() + 1.0)  # the exact slot's score is 0
        np.testing.assert_allclose(coded.output[b, 0, n], weights @ values[b, n // 2, seen], atol=1e-5)
        np.testing.assert_allclose(plain.output[b, 0, n], np.full(16, 1 - weights.sum()), atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "slots", "block"), [(2, 8192, 2048), (2, 8257, 2065), (16, 8192, 256), (512, 8192, 256), (2, 100, 100)]
)
def test_blocks_are_equal_and_hold_about_a_mebibyte(rows, slots, block):
    assert block_slots_for(rows, slots, 64) == block


def scattered(*, tokens, slots=(700, 300), kv_heads=2, pad=True, seed=11):
    """Two segments with positions of each head's own, a third of the slots empty; the last token of row 0 is padding.

    Gives queries, arrays of each segment (keys, values, positions), and query positions.
    """
    generator = np.random.default_rng(seed)
    queries = inputs(tokens=tokens, kv_heads=kv_heads, seed=seed)[0] * 2
    places = np.stack([[generator.permutation(sum(slots)) for _ in range(kv_heads)] for _ in range(2)])
    places[generator.random(places.shape) < 0.3] = -1
    segments, start = [], 0
    for index, size in enumerate(slots):
        _, keys, values = inputs(slots=size, kv_heads=kv_heads, seed=seed + index)
        segments.append((keys, values, places[:, :, start : start + size].astype(np.int32)))
        start += size
    query_positions = generator.integers(200, sum(slots), (2, tokens)).astype(np.int32)
    if pad and tokens > 1:
        query_positions[0, -1] = -1
    return queries, segments, query_positions


def segment_of(queries, keys, values, positions, **rest):
    return Segment(
        queries=queries,
        keys=(Coded(planes=(keys,)),),
        values=(Coded(planes=(values,)),),
        positions=jnp.asarray(positions),
        num_kv_heads=rest.pop("num_kv_heads", keys.shape[1]),
        **rest,
    )


def masses_of(queries, segments, query_positions, scale):
    """Masses of all slots, segment after segment, from the whole matrix of probabilities in float64: name -> B K S."""
    keys = np.concatenate([np.asarray(keys, np.float64) for keys, _, _ in segments], axis=2)
    positions = np.concatenate([positions for _, _, positions in segments], axis=2)
    kv_heads, group = keys.shape[1], queries.shape[2] // keys.shape[1]
    by_head = np.asarray(queries, np.float64).reshape(*queries.shape[:2], kv_heads, group, -1)
    seen = (positions[:, :, None] >= 0) & (positions[:, :, None] <= query_positions[:, None, :, None])  # B K T S
    scores = np.einsum("BTKGD,BKSD->BKGTS", by_head, keys) * scale
    weights = np.where(seen[:, :, None], np.exp(scores), 0.0)
    shares = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    low = seen[:, :, None] & (shares < 1 / np.maximum(seen.sum(-1), 1)[:, :, None, :, None])
    return {"sum": shares.sum(3).mean(2), "peak": shares.max((2, 3)), "low": low.sum(3).mean(2)}


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("tokens", [1, 5])
def test_masses_are_those_of_the_whole_matrix(tokens, mass, monkeypatch):
    """Slots in several blocks, holes, positions apart, padding; and asking for them changes nothing else."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    assert block_slots_for(4, 700, 16) == 234  # the last of three overlaps its neighbour
    queries, segments, newest = scattered(tokens=tokens)
    parts = tuple(segment_of(queries, *segment) for segment in segments)
    asked = decode_attention(parts, query_positions=jnp.asarray(newest), scale=0.25, mass=mass)
    expected = masses_of(queries, segments, newest, 0.25)[mass]
    ours = np.concatenate([one.mass for one in asked], axis=2)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-7)
    places = np.concatenate([positions for _, _, positions in segments], axis=2)
    np.testing.assert_array_equal(ours[places < 0], 0)
    plain = decode_attention(parts, query_positions=jnp.asarray(newest), scale=0.25)
    for one, other in zip(asked, plain, strict=True):
        np.testing.assert_array_equal(one.output, other.output)
        assert other.mass is None


def test_masses_add_up_to_the_tokens_that_see_anything():
    queries, segments, newest = scattered(tokens=5)
    parts = tuple(segment_of(queries, *segment) for segment in segments)
    asked = decode_attention(parts, query_positions=jnp.asarray(newest), scale=0.25, mass="sum")
    total = sum(np.asarray(one.mass).sum(axis=2) for one in asked)
    np.testing.assert_allclose(total, np.broadcast_to((newest >= 0).sum(1)[:, None], total.shape), atol=1e-5)


@pytest.mark.parametrize("mass", MASSES)
def test_masses_of_queries_that_see_nothing_are_zero(mass):
    """Padding alone, an empty segment, and NaN in it."""
    queries, segments, newest = scattered(tokens=2)
    (keys, values, positions), other = segments
    none = segment_of(queries, keys * jnp.nan, values, np.full_like(positions, -1))
    nothing = decode_attention((none,), query_positions=jnp.asarray(newest), scale=0.25, mass=mass)
    padding = decode_attention(
        (segment_of(queries, *other),), query_positions=jnp.full((2, 2), -1), scale=0.25, mass=mass
    )
    assert not np.asarray(nothing[0].mass).any()
    assert not np.asarray(padding[0].mass).any()


@pytest.mark.parametrize("mass", [None, *MASSES])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_pool_equals_slots_of_each_heads_own(tokens, mass, monkeypatch):
    """All heads' slots in one pool, in any order, an owner each, beside a segment that is no pool."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    queries, segments, newest = scattered(tokens=tokens)
    keys, values, positions = segments[0]
    pool, order = 2 * 700, np.random.default_rng(2).permutation(1400)

    def pooled(array):
        return jnp.asarray(np.asarray(array).reshape(2, 1, pool, *array.shape[3:])[:, :, order])

    owners = np.broadcast_to(np.repeat(np.arange(2, dtype=np.int32), 700)[order], (2, 1, pool))
    shared = segment_of(
        queries, pooled(keys), pooled(values), pooled(positions), owners=jnp.asarray(owners), num_kv_heads=2
    )
    rest = segment_of(queries, *segments[1])
    where = {"query_positions": jnp.asarray(newest), "scale": 0.25, "mass": mass}
    ours = decode_attention((shared, rest), **where)
    theirs = decode_attention((segment_of(queries, *segments[0]), rest), **where)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.output, other.output, rtol=0, atol=2e-6)
        np.testing.assert_allclose(one.weight, other.weight, rtol=0, atol=2e-6)
    if mass is not None:
        assert ours[0].mass.shape == (2, 1, pool)
        np.testing.assert_allclose(ours[0].mass, pooled(theirs[0].mass), rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(ours[1].mass, theirs[1].mass, rtol=2e-5, atol=1e-7)


PAGED = [
    (of_floats("float32"), of_floats("bfloat16"), 16, {}),
    (of_bits(4), of_bits(8), 16, {"own": True, "tokens": 2}),
    (of_bits(3), of_bits(2), 8, {"batch": 2}),
    (of_bits(2, **FORMS["by channel"]), of_bits(4, **FORMS["channels"]), 16, {}),
    (of_bits(4, levels=LEVELS), of_bits(1), 24, {}),
    (of_bits(4), of_bits(8), 3, {}),
    (of_bits(4, **FORMS["by channel"]), of_floats("float8_e4m3fn"), 64, {}),
]


@pytest.mark.parametrize("index", range(len(PAGED)))
def test_pages_equal_the_whole_segment_with_all_others_empty(index, monkeypatch):
    """Each head's own pages in any order, some entries none; what lies elsewhere is NaN and cannot matter."""
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    keys, values, page, changes = PAGED[index]
    segment, positions = made(keys, values, slots=768, size=32, **changes)
    own, others_empty = paged(segment, page, 320 // page // 2 * 2, missing=2)
    given = {"query_positions": positions, "scale": 0.25}

    @jax.jit
    def both():
        attended = [decode_attention((one,), **given)[0] for one in (own, others_empty)]
        return [(one.output, one.weight) for one in attended]

    (ours, weight), (theirs, its_weight) = both()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(weight, its_weight, atol=1e-6)


def test_masses_of_pages_are_in_the_order_of_the_list():
    segment, positions = made(of_floats("float32"), of_floats("float32"), slots=128, size=16)
    own, others_empty = paged(segment, 8, 6)
    given = {"query_positions": positions, "scale": 0.25, "mass": "sum"}
    ours, theirs = jax.jit(lambda: [decode_attention((one,), **given)[0].mass for one in (own, others_empty)])()
    slots = (np.asarray(own.pages)[..., None] * 8 + np.arange(8)).reshape(1, 2, -1)
    expected = np.where(slots < 0, 0.0, np.take_along_axis(np.asarray(theirs), np.maximum(slots, 0), axis=2))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
