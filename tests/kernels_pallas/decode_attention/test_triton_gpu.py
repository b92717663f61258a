"""The kernel in interpret mode against the reference and `jax.nn.dot_product_attention`, what it does not serve, and
what the compiler for an H200 that is not there makes of it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, Rotated
from kernels_pallas.decode_attention import Segment, reference, triton_gpu
from tests.cuda import needs_cuda
from tests.kernels_pallas.decode_attention.gpu_cases import CASES, CHIP, attend, in_parts, made, packed, resources_of
from tests.kernels_pallas.decode_attention.parts import paged
from tests.kernels_pallas.decode_attention.running import assert_equal, finished

TOLERANCE = {"float32": 2e-6, "float16": 1e-3}  # of the largest number
ROUNDED = 4e-3  # to bfloat16: weights, and the values of bfloat16


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Several blocks for each of several splits."""
    monkeypatch.setattr(triton_gpu, "_WARPS", 16)


by_interpreter = jax.jit(functools.partial(attend, interpret=True))
by_definition = jax.jit(functools.partial(attend, walk=reference.walk))


def by_kernel(*given):
    """Output and log of the sum of weights."""
    return finished(by_interpreter(*arrays_of(*given)))


def by_reference(*given):
    return finished(by_definition(*arrays_of(*given)))


def arrays_of(segment, query_positions):
    return (
        segment.queries,
        segment.keys,
        segment.values,
        segment.positions,
        query_positions,
        segment.bias,
        segment.pages,
    )


KINDS = [
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float8_e4m3fn", "float8_e5m2"),
    ("int8", "int8"),
    ("int3", "table3"),
    ("int1", "table2"),
    ("table4", "table4"),
    ("channel2", "group2"),
    ("channel8", "channel4"),
    ("token4", "token2"),
    ("bfloat16", "int4"),
]
SHAPES = [
    ("int4", {"group": 1, "stored": 4, "batch": 1}),
    ("int4", {"group": 5, "tokens": 16, "size": 80, "slots": 152, "stored": 1}),
    ("bfloat16", {"size": 96, "slots": 117, "heads": 2}),
    ("int8", {"slots": 117, "batch": 1}),
    ("bfloat16", {"size": 576, "width": 512, "stored": 1, "batch": 1, "group": 16, "slots": 64}),
    ("int4", {"size": 256, "stored": 1, "batch": 1, "slots": 64}),
]


@pytest.mark.parametrize(("keys", "values"), KINDS)
def test_equals_the_reference(keys, values):
    """Every way in which numbers are kept, and some of them mixed; NaN in what is empty."""
    given = made(keys, values, batch=1)
    assert triton_gpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE.get(values, ROUNDED))


@pytest.mark.parametrize(("kind", "changes"), SHAPES)
def test_other_shapes_do_too(kind, changes):
    """Groups, tokens, head sizes; a last block that is not whole; heads with tokens of their own; a latent's shape."""
    given = made(kind, **changes)
    assert triton_gpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), ROUNDED)


@pytest.mark.gpu
@pytest.mark.optimised
@pytest.mark.parametrize(("kinds", "changes"), [*((kinds, {}) for kinds in KINDS), *(((k, k), c) for k, c in SHAPES)])
def test_a_gpu_gets_what_a_cpu_does(kinds, changes):
    """Not interpreted, where a GPU is at hand; the reference runs on the CPU, whose float32 is not rounded."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs an NVIDIA GPU, and JAX_PLATFORMS=cuda,cpu")
    given = arrays_of(*made(*kinds, **changes))
    there = jax.device_put(given, jax.devices("cpu")[0])
    ours = finished(jax.jit(attend)(*given))
    assert_equal(ours, finished(by_definition(*there)), TOLERANCE.get(kinds[1], 2e-3))


PARTS = [
    ((("int2", 32), ("int4", 32)), (("table4", 32), ("token2", 32))),
    ((("bfloat16", 32), ("int4", 32)), (("bfloat16", 16), ("int8", 48))),
    ((("channel2", 32), ("int3", 32)), (("group2", 64),)),
]


@pytest.mark.parametrize(("keys", "values"), PARTS)
def test_parts_follow_each_other(keys, values):
    """Codes of several widths beside each other, and beside floats."""
    given = in_parts(keys, values, batch=1)
    assert triton_gpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), ROUNDED)


@pytest.mark.parametrize("tokens", [1, 2])
def test_heads_that_share_a_pool_see_their_own_slots(tokens):
    given, query_positions = made("int4", batch=2, stored=1, group=12, tokens=tokens)
    owners = jnp.asarray(np.random.default_rng(3).integers(0, 3, given.positions.shape), jnp.int32)
    segment = dataclasses.replace(given, owners=owners, num_kv_heads=3)
    assert triton_gpu.unsupported(segment, CHIP) is None
    scale = segment.queries.shape[3] ** -0.5
    ours, theirs = (
        finished(jax.jit(walk)(segment.queries, query_positions))
        for walk in (
            lambda queries, positions: triton_gpu.walk(
                dataclasses.replace(segment, queries=queries), positions, scale, interpret=True
            ),
            lambda queries, positions: reference.walk(dataclasses.replace(segment, queries=queries), positions, scale),
        )
    )
    assert_equal(ours, theirs, ROUNDED)


def test_queries_see_what_is_before_them_and_padding_sees_nothing():
    """Rows of a batch end apart; blocks behind the last live one hold what would be seen at once."""
    segment, _ = made("int4", tokens=2)
    query_positions = jnp.asarray([[3, 100], [-1, 40]], jnp.int32)
    ours = by_kernel(segment, query_positions)
    assert_equal(ours, by_reference(segment, query_positions), ROUNDED)
    assert (ours[0][1, :, 0] == 0).all()
    nothing = dataclasses.replace(segment, positions=jnp.full_like(segment.positions, -1))
    output, logs = by_kernel(nothing, query_positions)
    assert (output == 0).all()
    assert np.isneginf(logs).all()


def test_blocks_are_walked_up_to_the_last_slot_that_is_seen():
    positions = jnp.asarray([[[0, 1, -1, 5, 2, 9, -1, -1]], [[-1] * 8], [[7, -1, -1, -1, -1, -1, -1, 3]]], jnp.int32)
    newest = jnp.asarray([[5], [5], [3]], jnp.int32)
    assert (-(-reference.live_slots(newest, positions) // 2)).tolist() == [3, 0, 4]


def test_a_bias_is_added_to_each_query():
    segment, positions = made("token4", batch=1)
    bias = np.random.default_rng(5).normal(size=segment.queries.shape[:3])
    given = dataclasses.replace(segment, bias=jnp.asarray(bias, jnp.float32)), positions
    ours = by_kernel(*given)
    assert_equal(ours, by_reference(*given), ROUNDED)
    expected = by_kernel(segment, positions)[1] + np.swapaxes(bias, 1, 2) * 64**-0.5
    np.testing.assert_allclose(ours[1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bfloat16", "table4"])
def test_a_second_witness_on_numbers_as_they_are_read(kind):
    segment, positions = made(kind, batch=1)
    keys, values = (jnp.nan_to_num(part[0].read()) for part in (segment.keys, segment.values))
    mask = ((segment.positions >= 0) & (segment.positions <= positions[0, 0]))[:, :, None]
    witness = jax.nn.dot_product_attention(
        segment.queries.astype(jnp.float32), jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), mask=mask
    )
    ours, _ = by_kernel(segment, positions)
    expected = np.swapaxes(np.asarray(witness), 1, 2)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=ROUNDED * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_a_sink_does_not_round_thousands_of_small_weights_to_nothing(kind):
    """One slot with 99 % of the weight beside 8,191 about equal ones, whose values have a mean of their own."""
    generator, slots, size, place = np.random.default_rng(0), 8192, 64, 5000
    codes = generator.integers(-8, 8, (2, 1, 1, slots, size))
    codes[1] = np.maximum(codes[1], 0)  # values: mean of about 2
    codes[0, :, :, place], codes[1, :, :, place] = 7, -7

    def part(codes):
        if kind == "int4":
            scale = jnp.full((1, 1, slots), 1 / 8, jnp.float16)
            return (Coded(planes=packed(jnp.asarray(codes), 4), bits=4, scale=scale),)
        return (Coded(planes=(jnp.asarray(codes / 8, kind),)),)

    products = codes[0, 0, 0].sum(axis=1) / 8 * size**-0.5
    others = np.delete(products, place)
    low, high = 0.0, 64.0  # the query at which the sink has 99 %
    for _ in range(60):
        factor = (low + high) / 2
        share = 1 / (1 + np.exp((others - products[place]) * factor).sum())
        low, high = (factor, high) if share < 0.99 else (low, factor)
    segment = Segment(
        queries=jnp.full((1, 1, 1, size), factor, jnp.bfloat16),
        keys=part(codes[0]),
        values=part(codes[1]),
        positions=jnp.arange(slots, dtype=jnp.int32)[None, None],
        num_kv_heads=1,
    )
    newest = jnp.full((1, 1), slots)
    ours, theirs = by_kernel(segment, newest), by_reference(segment, newest)
    assert_equal(ours, theirs, 2e-3)
    # And of what the others give, which is a hundredth, nearly all arrives.
    sink = -7 / 8
    np.testing.assert_allclose((ours[0] - 0.99 * sink).mean(), (theirs[0] - 0.99 * sink).mean(), rtol=0.02)


def test_over_a_mesh_each_device_runs_it_on_what_it_has():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = made("int4")
    ours = jax.jit(functools.partial(attend, interpret=True, mesh=mesh))(*arrays_of(*given))
    assert_equal(finished(ours), by_reference(*given), ROUNDED)


PAGED = [
    ("bfloat16", {"size": 32}, (8, 9)),
    ("float32", {"tokens": 2}, (12, 5)),
    ("int4", {"batch": 1}, (16, 6)),
    ("int3", {"batch": 1}, (8, 11)),
    ("channel2", {"batch": 1, "values": "group2"}, (16, 5)),
    ("int8", {"slots": 189, "batch": 1}, (3, 30)),
    ("table2", {"batch": 1, "size": 80}, (4, 17)),
]


@pytest.mark.parametrize("index", range(len(PAGED)))
def test_pages_are_read_where_they_are_stored(index):
    """Each head's own, in any order; what lies in others, and what an entry of no page finds, cannot matter."""
    kind, changes, (page, count) = PAGED[index]
    segment, query_positions = made(kind, **changes)
    segment, others_empty = paged(segment, page, count)
    assert triton_gpu.unsupported(segment, CHIP) is None
    ours = by_kernel(segment, query_positions)
    assert_equal(ours, by_reference(others_empty, query_positions), TOLERANCE.get(kind, ROUNDED))


def unserved():
    """What a segment is, and why it is not served."""
    segment, _ = made("int8", slots=64)
    part = segment.keys[0]
    turned = Rotated(parts=(part,), basis=None, mean=None, frequencies=(0.0,) * 32)
    plane = jax.ShapeDtypeStruct((32, 8, 262144, 80), jnp.int8)
    groups = jnp.ones((2, 2, 16, 64), jnp.float16)
    by_pairs = dataclasses.replace(part, scale=jnp.ones((2, 2, 32, 64), jnp.float16), token_group=2)
    return [
        ({"keys": (part, turned)}, "keys are turned when they are read"),
        ({"values": (part,) * 9}, "values have 9 groups of channels, more than 8"),
        ({"keys": (Coded(planes=(part.planes[0],)),)}, "keys are of int8"),
        ({"keys": (dataclasses.replace(part, bits=None, dtype="float8_e4m3b11fnuz"),)}, "are of float8_e4m3b11fnuz"),
        ({"keys": (Coded(planes=(jnp.zeros((2, 2, 64, 64)),), scale=part.scale),)}, "keys are floats with scales"),
        ({"values": (dataclasses.replace(part, scale=groups),)}, "values have 4 numbers that share a scale"),
        ({"values": (Coded(planes=(part.planes[0][..., :40],), bits=8),)}, "have 40 numbers that share a scale"),
        ({"keys": (dataclasses.replace(part, scale=None, token_group=32),)}, "keys have offsets or groups of tokens"),
        ({"keys": (by_pairs,), "values": made("int2", slots=64)[0].values}, "groups of tokens divide the 4 tokens"),
        ({"keys": (Coded(planes=(plane,), bits=8),)}, "keys take 2 GiB or more as single bytes"),
        ({"owners": segment.positions}, "a pool has several stored heads"),
        ({"values": made("int8", slots=64, stored=1)[0].values}, "keys and values are not of as many heads"),
        ({"positions": jnp.zeros((2, 4, 64), jnp.int32)}, "heads that hold tokens of their own share stored keys"),
        ({"queries": jnp.zeros((2, 40, 16, 64))}, "320 queries share a head, more than 256"),
        ({"pages": jnp.zeros((2, 4, 8), jnp.int32), "page": 4}, "pages are not of as many heads as keys and values"),
        (
            {"values": made("int2", slots=64)[0].values, "pages": jnp.zeros((2, 2, 8), jnp.int32), "page": 2},
            "pages of 2 slots part the 4 tokens that share a byte",
        ),
    ]


@pytest.mark.parametrize("index", range(16))
def test_what_is_not_served_says_why(index):
    segment, (changes, reason) = made("int8", slots=64)[0], unserved()[index]
    assert reason in triton_gpu.unsupported(dataclasses.replace(segment, **changes), CHIP)


def test_more_groups_of_channels_than_make_a_kernel_are_not_served_nor_are_other_devices():
    segment, _ = made("group2", slots=64, size=512)
    assert triton_gpu.unsupported(segment, CHIP) == "keys have 16 groups of channels, more than 8"
    plain, _ = made("bfloat16", slots=64)
    assert triton_gpu.unsupported(plain, "TPU v6 lite") == "it runs on NVIDIA GPUs, and this is TPU v6 lite"
    assert triton_gpu.unsupported(plain, "cpu") == "it runs on NVIDIA GPUs, and this is cpu"


@pytest.mark.skipif(jax.__version_info__ > (0, 10, 2), reason="later versions ask CUDA's compiler at once")
@pytest.mark.parametrize("name", ["bf16", "int3", "lloyd4", "kivi2", "fp8", "int4.t16"])
def test_the_route_takes_every_operation(name):
    """Without a compiler for the chip: what is beyond Pallas's Triton is refused here."""
    check = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    function = jax.export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=[check])
    assert "__gpu$xla.gpu.triton" in function(*CASES[name].build()).mlir_module()


SPILLED = {"lloyd3": 64, "lloyd4": 8, "kivi2": 16, "kivi2.pages": 32}
"""Bytes that may be spilled, by kernels that take all 255 registers; of 6,000 instructions a step."""


@needs_cuda
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_h200_takes_it_and_spills_next_to_nothing(name, tmp_path, record_property):
    registers, spilled = resources_of("decode_attention", name, tmp_path, record_property)
    assert registers <= 255
    assert spilled <= SPILLED.get(name, 0)
