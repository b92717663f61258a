"""What a step does beside reading parts: pools, several parts, mixtures, many queries, NaN, and what it may touch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.decode_attention import mosaic_floats, mosaic_tpu, reference
from tests.kernels_pallas.decode_attention.parts import FORMS, LEVELS, coded, floats, made, of_bits, of_floats
from tests.kernels_pallas.decode_attention.running import assert_equal, finished

TOLERANCE = {"coded": 5e-4, "bfloat16": 4e-3, "float32": 2e-6}


@pytest.fixture(autouse=True)
def floats_only(monkeypatch):
    """A chip that multiplies no integers, and blocks of few slots."""
    monkeypatch.setattr(mosaic_tpu, "_FLOATS_ONLY", ("cpu",))
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 256)


def compare(segment, query_positions, tolerance, *, interpret=True):
    scale = segment.queries.shape[3] ** -0.5
    assert mosaic_tpu.unsupported(segment, "TPU7x") is None
    ours = finished(mosaic_tpu.walk(segment, query_positions, scale, interpret=interpret))
    assert_equal(ours, finished(reference.walk(segment, query_positions, scale)), tolerance)
    return ours


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 3, "group": 8},
        {"tokens": 16, "group": 1, "size": 80, "own": True},
        {"stored": 3, "size": 96, "slots": 520, "batch": 2},
        {"stored": 12, "group": 1, "slots": 256},
        {"stored": 1, "size": 256, "slots": 64},
    ],
)
def test_shapes(changes):
    """Tokens, tokens of a head's own, sizes of heads, heads in several steps, a last block that is not whole."""
    compare(*made(of_bits(4), of_bits(4), **changes), TOLERANCE["coded"])


@pytest.mark.parametrize("kind", [4, "float8_e4m3fn"])
def test_scores_of_several_heads_may_come_before_their_weights(kind, monkeypatch):
    maker = of_bits(kind) if isinstance(kind, int) else of_floats(kind)
    segment, positions = made(maker, maker, stored=6, group=2, slots=520)
    assert mosaic_tpu.plan_for(segment, 1.0, "cpu").ahead
    ours = compare(segment, positions, 4e-3)
    monkeypatch.setattr(mosaic_tpu, "_NARROW", ("cpu",))
    assert not mosaic_tpu.plan_for(segment, 1.0, "cpu").ahead
    assert_equal(compare(segment, positions, 4e-3), ours, 0.0)


def test_where_nothing_is_coded_scores_of_a_head_come_before_its_own_weights():
    segment, _ = made(of_floats("bfloat16"), of_floats("bfloat16"))
    assert not mosaic_tpu.plan_for(segment, 1.0, "cpu").ahead


@pytest.mark.parametrize("kinds", [("bfloat16", 4), (4, "float32"), (2, 8), ("bfloat16", "float32"), (3, "bfloat16")])
def test_keys_and_values_of_two_kinds(kinds):
    makers = [of_bits(kind) if isinstance(kind, int) else of_floats(kind) for kind in kinds]
    compare(*made(*makers), 4e-3 if "bfloat16" in kinds else TOLERANCE["coded"])


def test_several_parts_beside_each_other():
    """Half of the numbers in 4 bits and half in 2, and single bits that the queries meet on their own."""

    def parts(generator, shape, empty):
        half = (*shape[:3], shape[3] // 2)
        sketch = coded(generator, 1, shape, empty=empty, levels=(-1.0, 1.0))
        return coded(generator, 4, half, empty=empty), coded(generator, 2, half, empty=empty), sketch

    def two(generator, shape, empty):
        half = (*shape[:3], shape[3] // 2)
        return coded(generator, 4, half, empty=empty, **FORMS["offsets"]), floats(
            generator, "bfloat16", half, empty=empty
        )

    compare(*made(parts, two), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kind", [4, "float32"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_heads_that_share_a_pool_see_their_own_slots(kind, tokens):
    maker = of_bits(kind) if isinstance(kind, int) else of_floats(kind)
    segment, positions = made(maker, maker, stored=1, group=8, tokens=tokens, slots=512)
    owners = jnp.asarray(np.random.default_rng(3).integers(0, 4, (1, 1, 512)), jnp.int32)
    segment = dataclasses.replace(segment, owners=owners, num_kv_heads=4)
    compare(segment, positions, TOLERANCE["coded" if kind == 4 else kind])


def test_a_slot_of_a_pool_that_no_head_owns_cannot_matter():
    segment, positions = made(of_floats("float32"), of_floats("float32"), stored=1, group=8, slots=512)
    owners = np.random.default_rng(3).integers(0, 4, (1, 1, 512)).astype(np.int32)
    owners[..., 100:300] = -1
    spoilt = dataclasses.replace(segment.values[0], planes=(segment.values[0].planes[0].at[:, :, 100:300].set(np.nan),))
    segment = dataclasses.replace(segment, owners=jnp.asarray(owners), num_kv_heads=4, values=(spoilt,))
    assert np.isfinite(compare(segment, positions, TOLERANCE["float32"])[0]).all()


def test_a_bias_and_rows_that_end_apart():
    segment, _ = made(of_bits(3, levels=LEVELS[::2]), of_bits(2, **FORMS["channels"]), batch=2, tokens=2)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=segment.queries.shape[:3]), jnp.float32)
    positions = jnp.asarray([[3, 300], [-1, 90]], jnp.int32)
    ours = compare(dataclasses.replace(segment, bias=bias), positions, TOLERANCE["bfloat16"])
    assert (ours[0][1, :, 0] == 0).all()


def test_a_segment_without_a_token_gives_nothing():
    segment, positions = made(of_bits(4), of_floats("float8_e4m3fn"))
    nothing = dataclasses.replace(segment, positions=jnp.full_like(segment.positions, -1))
    assert (compare(nothing, positions, 0.0)[0] == 0).all()


@pytest.mark.parametrize("native", [(), ("float8_e4m3fn",), ("float8_e4m3b11fnuz",)])
@pytest.mark.parametrize("kind", ["by channel", "channels", "float8_e4m3fn"])
def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may(kind, native, monkeypatch):
    """No race, no read outside, and nothing uninitialised: DMA and memory are simulated."""
    monkeypatch.setattr(mosaic_tpu, "_NATIVE", {"cpu": native})
    maker = of_bits(2, **FORMS[kind]) if kind in FORMS else of_floats(kind)
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        compare(*made(maker, maker, slots=520 if kind != "by channel" else 512), 4e-3, interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_sink_beside_thousands_of_small_weights(bits, monkeypatch):
    """One slot with 99 % of the weight; what the 8,191 others give, a hundredth, arrives to a fiftieth."""
    monkeypatch.setattr(mosaic_floats, "_CODED_SLOTS", 2048)
    segment, positions = made(of_bits(bits), of_bits(bits), stored=1, group=1, slots=8192, size=64)
    place = int(np.flatnonzero(np.asarray(segment.positions[0, 0]) >= 0)[5000])
    bias_free = segment.keys[0].read()[0, 0, place]
    aim = jnp.asarray(bias_free / jnp.sum(bias_free**2), jnp.float32)  # a product of 1 with the sink
    products = np.nan_to_num(np.asarray(segment.keys[0].read()[0, 0] @ aim, np.float64))
    seen = np.asarray(segment.positions[0, 0]) >= 0
    low, high = 0.0, 64.0
    for _ in range(60):
        factor = (low + high) / 2
        others = np.exp((products[seen] - products[place]) * factor).sum() - 1
        low, high = (factor, high) if 1 / (1 + others) < 0.99 else (low, factor)
    queries = jnp.broadcast_to(aim * (factor * 64**0.5), segment.queries.shape)
    segment = dataclasses.replace(segment, queries=queries)
    ours = compare(segment, positions, 2e-3)
    sink = 0.99 * np.asarray(segment.values[0].read()[0, 0, place])
    theirs = finished(reference.walk(segment, positions, 64**-0.5))
    rest, expected = ours[0][0, 0, 0] - sink, theirs[0][0, 0, 0] - sink
    assert np.abs(rest - expected).max() < 0.02 * np.abs(expected).max()
