"""The kernel in interpret mode against the reference and `jax.nn.dot_product_attention`, and what it does not serve."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.coded import Coded, Rotated, pack
from kernels_pallas.decode_attention import Segment, mosaic_floats, mosaic_plan, mosaic_tpu, reference
from kernels_pallas.decode_attention.api import choose, decode_attention
from tests.kernels_pallas.aot import compile_cases
from tests.kernels_pallas.decode_attention import odd_cases
from tests.kernels_pallas.decode_attention.running import assert_equal, finished
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"
KINDS = ("float32", "bfloat16", 8, 4, 2)
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3, 8: 1e-3, 4: 1e-3, 2: 1e-3}  # of the largest number
BLOCK = 512  # the bytes of 512 codes of two bits fill a tile
WIDE, NARROW = (), ("cpu",)  # what chips have a matrix unit as wide as one head


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in few slots, with two heads."""
    monkeypatch.setattr(mosaic_floats, "_BLOCK_SLOTS", {4: BLOCK, 2: BLOCK})
    monkeypatch.setattr(mosaic_plan, "_BLOCK_SLOTS", dict.fromkeys(mosaic_plan.BITS, BLOCK // 2))


def part_of(generator, kind, shape, *, empty, shift=0.5):
    """Numbers of a kind, and NaN wherever empty slots can hold it."""
    if isinstance(kind, str):
        numbers = np.where(empty[..., None], np.nan, generator.normal(size=shape))
        return Coded(planes=(jnp.asarray(numbers, kind),))
    half = 1 << (kind - 1)
    codes = jnp.asarray(generator.integers(-half, half, shape))
    scale = np.where(empty, np.nan, generator.uniform(0.5, 1.5, shape[:3]) / half)
    return Coded(planes=pack(codes, kind), bits=kind, scale=jnp.asarray(scale, jnp.float16), shift=shift)


def made(
    kind, values=None, *, batch=2, stored=2, group=4, tokens=1, slots=3 * BLOCK, size=64, heads=1, shift=0.5, seed=0
):
    """A segment with a tenth of its slots empty, and queries at its newest positions."""
    generator = np.random.default_rng(seed)
    positions = np.tile(np.arange(slots, dtype=np.int32), (batch, heads, 1))
    positions[generator.random(positions.shape) < 0.1] = -1
    empty = np.broadcast_to((positions < 0).all(axis=1, keepdims=True), (batch, stored, slots))
    shape = (batch, stored, slots, size)
    segment = Segment(
        queries=jnp.asarray(generator.normal(size=(batch, tokens, stored * group, size)), jnp.float32),
        keys=(part_of(generator, kind, shape, empty=empty, shift=shift),),
        values=(part_of(generator, values or kind, shape, empty=empty, shift=shift),),
        positions=jnp.asarray(positions),
        num_kv_heads=stored,
    )
    return segment, jnp.asarray(slots - tokens + np.tile(np.arange(tokens, dtype=np.int32), (batch, 1)))


def by_kernel(segment, query_positions, *, interpret=True, mesh=None):
    """Output and log of the sum of weights."""
    scale = segment.queries.shape[3] ** -0.5
    return finished(mosaic_tpu.walk(segment, query_positions, scale, interpret=interpret, mesh=mesh))


def by_reference(segment, query_positions):
    return finished(reference.walk(segment, query_positions, segment.queries.shape[3] ** -0.5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"group": 1, "stored": 4, "batch": 1},
        {"group": 8, "tokens": 3, "batch": 1},
        {"tokens": 16, "group": 1, "size": 80, "slots": BLOCK},
        {"slots": 3 * BLOCK - 128, "size": 96, "batch": 1},
        {"heads": 2, "size": 256, "slots": BLOCK},
    ],
)
def test_equals_the_reference(kind, changes):
    """Groups, tokens, head sizes; a block alone, and a last one that is not whole; heads with tokens of their own."""
    given = made(kind, **changes)
    assert mosaic_tpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE[kind])


@pytest.mark.parametrize("narrow", [WIDE, NARROW])
@pytest.mark.parametrize("kinds", [(8, 8), (4, 4), (2, 2), (8, 4), (8, 2), (4, 2)])
def test_heads_share_a_pass_where_the_matrix_unit_is_wide_and_keys_may_have_more_bits(kinds, narrow, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "_NARROW", narrow)
    given = made(*kinds, size=128, batch=1, slots=2 * BLOCK)
    assert mosaic_tpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE[kinds[1]])


@pytest.mark.parametrize("kind", ["bfloat16", 8, 4])
def test_queries_see_what_is_before_them_and_padding_sees_nothing(kind):
    """Rows of a batch end apart; blocks behind the last live one hold what would be seen at once."""
    segment, _ = made(kind, tokens=2)
    query_positions = jnp.asarray([[3, 300], [-1, 90]], jnp.int32)
    ours = by_kernel(segment, query_positions)
    assert_equal(ours, by_reference(segment, query_positions), TOLERANCE[kind])
    assert (ours[0][1, :, 0] == 0).all()
    nothing = dataclasses.replace(segment, positions=jnp.full_like(segment.positions, -1))
    assert (by_kernel(nothing, query_positions)[0] == 0).all()


@pytest.mark.parametrize("kind", ["float32", 4])
def test_a_bias_is_added_to_each_query(kind):
    segment, positions = made(kind)
    generator = np.random.default_rng(5)
    bias = jnp.asarray(generator.normal(size=segment.queries.shape[:3]), jnp.float32)
    given = dataclasses.replace(segment, bias=bias), positions
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE[kind])


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_codes_may_count_from_anywhere(shift):
    given = made(4, shift=shift, batch=1)
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE[4])


@pytest.mark.parametrize(("bits", "size"), [(4, 128), (2, 256)])
def test_levels_of_a_table_are_looked_up(bits, size):
    """Levels farther apart at the ends, as Lloyd-Max has them, to a byte's precision."""
    levels = tuple(float(np.sign(x) * abs(x) ** 1.3) for x in np.linspace(-1.5, 1.5, 1 << bits))
    segment, positions = made(bits, size=size, batch=1, slots=2 * BLOCK, shift=0.0)
    keys, values = ((dataclasses.replace(part[0], levels=levels),) for part in (segment.keys, segment.values))
    given = dataclasses.replace(segment, keys=keys, values=values), positions
    assert mosaic_tpu.unsupported(given[0], CHIP) is None
    assert_equal(by_kernel(*given), by_reference(*given), 5e-3)


def test_scales_may_be_subnormal_and_zero():
    """The least float16 are integers times 2**-24."""
    segment, positions = made(4, batch=1, slots=BLOCK)
    slots = jnp.arange(BLOCK)
    parts = []
    for part in (segment.keys[0], segment.values[0]):
        scale = jnp.where(slots % 2 == 0, part.scale * jnp.float16(2**-16), part.scale)
        parts.append((dataclasses.replace(part, scale=jnp.where(slots % 5 == 0, jnp.float16(0), scale)),))
    given = dataclasses.replace(segment, keys=parts[0], values=parts[1]), positions
    assert_equal(by_kernel(*given), by_reference(*given), TOLERANCE[4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_witness_on_numbers_as_they_are_read(kind):
    segment, positions = made(kind, slots=2 * BLOCK)
    keys, values = (jnp.nan_to_num(part[0].read()) for part in (segment.keys, segment.values))
    mask = (segment.positions >= 0)[:, :, None]
    witness = jax.nn.dot_product_attention(
        segment.queries, jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2), mask=mask
    )
    ours, _ = by_kernel(segment, positions)
    expected = np.swapaxes(np.asarray(witness), 1, 2)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE[kind] * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["bfloat16", 8, 4])
@pytest.mark.parametrize("place", [0, 5000])
def test_a_sink_does_not_round_thousands_of_small_weights_to_nothing(kind, place, monkeypatch):
    """One slot with 99 % of the weight beside 8,191 about equal ones, whose values have a mean of their own."""
    monkeypatch.setattr(mosaic_floats, "_BLOCK_SLOTS", {2: 1024})
    monkeypatch.setattr(mosaic_plan, "_BLOCK_SLOTS", {8: 2048 // 2, 4: 4096 // 2})
    generator, slots, size = np.random.default_rng(0), 8192, 64
    half = 1 << ((kind if isinstance(kind, int) else 8) - 1)
    codes = generator.integers(-half, half, (2, 1, 1, slots, size))
    codes[1] = np.maximum(codes[1], 0)  # values: mean of about half / 2
    codes[1, :, :, place] = -half + 1
    codes[0, :, :, place] = half - 1
    scale = np.full((1, 1, slots), 1 / half)

    def part(codes):
        if isinstance(kind, str):
            return (Coded(planes=(jnp.asarray(codes / half, kind),)),)
        return (Coded(planes=pack(jnp.asarray(codes), kind), bits=kind, scale=jnp.asarray(scale, jnp.float16)),)

    query = np.full((1, 1, 1, size), 1.0)
    products = codes[0, 0, 0] @ query[0, 0, 0] / half * size**-0.5
    others = np.delete(products, place)
    # The scale of the query at which the sink has 99 %.
    low, high = 0.0, 64.0
    for _ in range(60):
        factor = (low + high) / 2
        share = 1 / (1 + np.exp((others - products[place]) * factor).sum())
        low, high = (factor, high) if share < 0.99 else (low, factor)
    segment = Segment(
        queries=jnp.asarray(query * factor, jnp.bfloat16),  # as a model gives them
        keys=part(codes[0]),
        values=part(codes[1]),
        positions=jnp.arange(slots, dtype=jnp.int32)[None, None],
        num_kv_heads=1,
    )
    newest = jnp.full((1, 1), slots)
    ours, theirs = by_kernel(segment, newest), by_reference(segment, newest)
    assert_equal(ours, theirs, 2e-3 if isinstance(kind, str) else 5e-3)
    # And of what the others give, which is a hundredth, most arrives.
    sink = -(half - 1) / half
    np.testing.assert_allclose((ours[0] - 0.99 * sink).mean(), (theirs[0] - 0.99 * sink).mean(), rtol=0.2)


@pytest.mark.parametrize("kind", ["bfloat16", 4])
def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may(kind):
    """No race, no read outside, and nothing uninitialised: DMA and memory are simulated."""
    given = made(kind, batch=2, slots=2 * BLOCK, size=128)
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        ours = by_kernel(*given, interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert_equal(ours, by_reference(*given), TOLERANCE[kind])


@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1)])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    given = made(4)
    ours = jax.jit(functools.partial(by_kernel_arrays, mesh=mesh))(*arrays_of(*given))
    assert_equal(finished(ours), by_reference(*given), TOLERANCE[4])
    odd = made(8, stored=1, batch=1)  # nothing divides: every device has all
    assert_equal(by_kernel(*odd, mesh=mesh), by_reference(*odd), TOLERANCE[8])


def arrays_of(segment, query_positions):
    return segment.queries, segment.keys[0], segment.values[0], segment.positions, query_positions


def by_kernel_arrays(queries, keys, values, positions, query_positions, *, mesh):
    segment = Segment(queries=queries, keys=(keys,), values=(values,), positions=positions, num_kv_heads=2)
    return mosaic_tpu.walk(segment, query_positions, 64**-0.5, interpret=True, mesh=mesh)


def unserved():
    """What a segment is, and why it is not served."""
    segment, _ = made(8, slots=128)
    part = segment.keys[0]
    turned = Rotated(parts=(part,), basis=None, mean=None, frequencies=(0.0,) * 32)
    table = dataclasses.replace(part, levels=tuple(map(float, range(256))))
    by_channel = dataclasses.replace(part, scale=jnp.ones((2, 2, 32, 64), jnp.float16), token_group=4)
    eight = dataclasses.replace(by_channel, bits=None, dtype="float8_e4m3fn")
    fewer = dataclasses.replace(part, planes=(part.planes[0][:, :1],), scale=part.scale[:, :1])
    return [
        ({"values": (part, turned)}, "values are turned when they are read"),
        ({"keys": (table,)}, "keys have a table of 256 levels for 8 bits, and not"),
        ({"keys": (dataclasses.replace(part, levels=(0.0, 1.0)),)}, "keys have a table of 2 levels for 8 bits"),
        ({"keys": (dataclasses.replace(part, offset=jnp.ones((2, 2, 128))),)}, "or offsets, and not in float16"),
        ({"keys": (eight,)}, "keys are 8-bit floats with scales of channels"),
        ({"values": (Coded(planes=(jnp.zeros((2, 2, 128, 64)),), shift=0.5),)}, "values are float32, or floats with"),
        ({"values": (by_channel,)}, "values have scales of 4 tokens, and not of 8, 16, 32, 64, 128 or 256"),
        ({"keys": (dataclasses.replace(part, scale=None),)}, "keys have no scales"),
        ({"keys": (dataclasses.replace(part, scale=jnp.ones((2, 2, 128))),)}, "keys have scales in float32"),
        ({"keys": (Coded(planes=(jnp.zeros((2, 2, 128, 64), jnp.float16),)),)}, "keys are float16, or floats with"),
        ({"values": (fewer,)}, "keys and values are not of as many heads"),
        ({"positions": jnp.zeros((2, 4, 128), jnp.int32)}, "heads that hold tokens of their own share stored keys"),
        ({"queries": jnp.zeros((2, 20, 16, 64))}, "160 queries share a head, more than 128"),
    ]


@pytest.mark.parametrize("index", range(13))
def test_what_is_not_served_says_why(index):
    segment, (changes, reason) = made(8, slots=128)[0], unserved()[index]
    changed = dataclasses.replace(segment, **changes)
    assert reason in mosaic_tpu.unsupported(changed, CHIP)


@pytest.mark.parametrize(
    ("kinds", "slots", "device", "integers"),
    [
        ((4, 4), 512, CHIP, True),
        ((8, 2), 512, "TPU v5 lite", True),
        ((4, 4), 512, "TPU7x", False),  # multiplies no integers
        ((2, 4), 512, CHIP, False),  # keys have fewer bits
        ((2, 2), 128, CHIP, False),  # fill no tile
        (("bfloat16", 4), 512, CHIP, False),
    ],
)
def test_integers_are_multiplied_where_chip_and_codes_have_them(kinds, slots, device, integers):
    segment, _ = made(*kinds, slots=slots)
    assert mosaic_tpu.unsupported(segment, device) is None
    assert isinstance(mosaic_tpu.plan_for(segment, 1.0, device), mosaic_plan.Plan) == integers


@pytest.mark.parametrize("mass", [None, "sum"])
def test_one_softmax_over_what_kernels_and_the_reference_walked(mass):
    """Maxima differ by implementation, outputs and sums make up for it; one row sees one segment, and one sees none."""
    exact, _ = made("bfloat16", slots=BLOCK, tokens=2, size=128)
    coded, _ = made(4, slots=BLOCK, tokens=2, size=128, seed=1)
    later = jnp.where(coded.positions >= 0, coded.positions + BLOCK, -1)
    coded = dataclasses.replace(coded, queries=exact.queries, positions=later)
    query_positions = jnp.asarray([[2 * BLOCK, 2 * BLOCK], [BLOCK // 2, -1]], jnp.int32)
    given = {"query_positions": query_positions, "scale": 128**-0.5, "mass": mass}
    kernel = functools.partial(mosaic_tpu.walk, interpret=True)
    expected = reference.decode_attention((exact, coded), **given)
    for walks in ((kernel, kernel), (reference.walk, kernel)):
        found = reference.decode_attention((exact, coded), **given, walks=walks)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.output, other.output, rtol=0, atol=4e-3 * np.abs(other.output).max())
            np.testing.assert_allclose(one.weight, other.weight, rtol=0, atol=4e-3)
            if mass is not None:
                np.testing.assert_allclose(one.mass, other.mass, rtol=0, atol=4e-3 * np.abs(other.mass).max())
    assert (found[1].weight[1] == 0).all()
    assert (found[0].output[1, 1] == 0).all()


def test_nan_in_padding_touches_no_other_query():
    segment, _ = made(4, slots=BLOCK, tokens=2, batch=1)
    query_positions = jnp.asarray([[BLOCK, -1]], jnp.int32)
    expected = by_kernel(segment, query_positions)
    spoilt = dataclasses.replace(segment, queries=segment.queries.at[:, 1].set(jnp.nan))
    assert_equal(by_kernel(spoilt, query_positions), expected, 0.0)
    assert np.isfinite(expected[0]).all()


def test_everything_wants_a_tpu_that_it_was_compiled_for():
    plain = made("bfloat16", slots=128)[0]
    assert mosaic_tpu.unsupported(plain, "TPU v4") == "it has not been compiled for TPU v4"
    assert mosaic_tpu.unsupported(plain, "NVIDIA H200") == "it runs on TPUs, and this is NVIDIA H200"
    choice = choose(plain)
    assert choice.name == "reference"
    assert choice.reasons[0] == "mosaic_tpu: it runs on TPUs, and this is cpu"
    with pytest.raises(ValueError, match="mosaic_tpu cannot serve this: it runs on TPUs, and this is cpu"):
        decode_attention((plain,), query_positions=jnp.zeros((2, 1), jnp.int32), scale=1.0, implementation="mosaic_tpu")
    assert choose(plain, implementation="reference").name == "reference"


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"])
def test_the_compiler_takes_odd_shapes(topology):
    """Head sizes, few and many heads, tokens of their own, ends that fill no tile."""
    compiled = compile_cases("tests.kernels_pallas.decode_attention.odd_cases", topology)
    assert compiled == [case.name for case in odd_cases.CASES]
