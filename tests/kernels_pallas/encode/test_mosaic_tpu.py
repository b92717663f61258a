"""The kernel in interpret mode against the reference, and what it does not serve."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.coded import pack, plane_bits, unpack
from kernels_pallas.encode import Integers, Table, encode, mosaic_tpu, reference
from kernels_pallas.encode.api import choose
from kernels_pallas.encode.cases import CASES, RULES
from tests.kernels_pallas.aot import TOPOLOGIES, compile_cases
from tests.libtpu import needs_libtpu

CHIP = "TPU v6 lite"
UNEVEN = (-1.0, -0.5, -0.2, -0.05, 0.0, 0.2, 0.6, 1.0)
ALL = {
    **{name: RULES[name] for name in ("int8", "half4", "table3", "table4")},
    "channel2": RULES["channel2"],
    "group2": RULES["group2"],
    "channels": Integers(bits=4, token_group=8, symmetric=True),
    "groups": Integers(bits=3, channel_group=16, clip=0.9),
    "clipped": Integers(bits=2, clip=0.9),
    "signs": Table(levels=(-0.8, 0.8), scale="unbiased"),
    "raw": dataclasses.replace(RULES["table2"], scale="raw"),
    "largest": Table(levels=UNEVEN, scale="largest"),
}


def drawn(*shape, seed=0, dtype="float32"):
    """Numbers, with a vector of zeros, a tiny and a huge one, and one of a large mean."""
    numbers = np.random.default_rng(seed).normal(size=shape)
    numbers[0, 0, 1] = 0
    numbers[0, 0, 2] *= 1e-6
    numbers[0, 0, 3] *= 1e7
    numbers[0, -1, 4] += 5
    return jnp.asarray(numbers, dtype)


@functools.partial(jax.jit, static_argnames=("rule", "interpret"))
def by_kernel(numbers, rule, basis=None, interpret=True):
    planes, scale, offset = mosaic_tpu.encode(numbers, rule, basis=basis, interpret=interpret)
    return reference.coded(planes, scale, offset, rule)


@functools.partial(jax.jit, static_argnames=("rule",))
def by_reference(numbers, rule, basis=None):
    return reference.encode(numbers, rule, basis=basis)


def assert_same(ours, theirs, *, most=0.0):
    """Codes equal but for a share of at most `most` that lie a step beside; scales to a step of a float16."""
    assert (ours.levels, ours.shift, ours.bits) == (theirs.levels, theirs.shift, theirs.bits)
    assert [plane.shape for plane in ours.planes] == [plane.shape for plane in theirs.planes]
    one, other = (np.asarray(unpack(part.planes, part.bits)).astype(int) for part in (ours, theirs))
    assert np.abs(one - other).max(initial=0) <= 1
    assert (one != other).mean() <= most
    for name in ("scale", "offset"):
        facts = [getattr(part, name) for part in (ours, theirs)]
        assert (facts[0] is None) == (facts[1] is None)
        if facts[0] is not None:
            assert facts[0].dtype == facts[1].dtype == jnp.float16
            np.testing.assert_allclose(*(np.asarray(fact, np.float32) for fact in facts), rtol=2**-9, atol=2**-24)


@pytest.mark.parametrize("name", ALL)
def test_equals_the_reference(name):
    """Without a transform sums alone are in another order, which moves no code of these."""
    numbers = drawn(2, 2, 160 if mosaic_tpu.shared(ALL[name])[0] > 1 else 40, 64)
    assert mosaic_tpu.unsupported(numbers.shape, numbers.dtype, ALL[name], CHIP) is None
    assert_same(by_kernel(numbers, ALL[name]), by_reference(numbers, ALL[name]), most=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("int8", (1, 3, 128, 128), "float32"),
        ("table3", (2, 1, 264, 80), "bfloat16"),
        ("int8", (1, 2, 1032, 256), "float32"),
    ],
)
def test_sizes_and_dtypes(name, shape, dtype):
    """Whole pieces and pieces that are filled up, several steps of a head, and numbers of half the width."""
    numbers = drawn(*shape, dtype=dtype)
    assert_same(by_kernel(numbers, RULES[name]), by_reference(numbers, RULES[name]), most=1e-4)


@pytest.mark.parametrize(("name", "own"), [("half4", True), ("int8", False)])
def test_a_transform_comes_first(name, own):
    """Products are summed in another order: of a thousand codes one may lie on the other side of a threshold."""
    numbers = drawn(2, 4, 64, 64)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 64, 64)))[0][..., :48]
    basis = jnp.asarray(basis if own else basis[0], jnp.float32)
    assert mosaic_tpu.unsupported(numbers.shape, numbers.dtype, RULES[name], CHIP, basis=basis.shape) is None
    assert_same(by_kernel(numbers, RULES[name], basis), by_reference(numbers, RULES[name], basis), most=1e-3)


def test_a_scale_is_rounded_as_a_float16_is():
    """Halves between neighbours, subnormal ones, the largest, and many others."""
    generator = np.random.default_rng(0)
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (finite[1:] + finite[:-1]) / 2
    others = np.abs(generator.normal(size=20_000)) * 10.0 ** generator.integers(-9, 7, 20_000)
    scales = np.concatenate([finite, middles, middles * (1 + 2.0**-22), middles * (1 - 2.0**-23), others, [65519, 1e9]])
    scales = jnp.asarray(scales, jnp.float32)
    np.testing.assert_array_equal(jax.jit(mosaic_tpu._as_half)(scales), reference.read_scale(scales))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_facts_of_tokens_go_to_lanes_and_back_and_bits_into_bytes(width):
    column = jnp.asarray(np.random.default_rng(0).normal(size=(128, 1)), jnp.float32)
    np.testing.assert_array_equal(mosaic_tpu._gather(column)[0], column[:, 0])
    np.testing.assert_array_equal(mosaic_tpu._spread(column.T), column)
    codes = jnp.arange(256 * 8, dtype=jnp.int32).reshape(256, 8) % (1 << width) - (1 << width) // 2

    def kernel(codes, packed):
        packed[...] = mosaic_tpu._pack(codes[...], low=0, width=width, last=True)

    shape = jax.ShapeDtypeStruct((32 * width, 8), jnp.int8)
    packed = pl.pallas_call(kernel, out_shape=shape, interpret=True)(codes)
    np.testing.assert_array_equal(packed, pack(codes, width)[0])


def test_interpreted_as_a_tpu_it_reads_and_writes_what_it_may():
    numbers, rule = drawn(1, 2, 128, 64), RULES["half4"]
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    try:
        ours = by_kernel(numbers, rule, interpret=parameters)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert_same(ours, by_reference(numbers, rule), most=1e-4)


@pytest.mark.parametrize("heads", [2, 3])
def test_over_a_mesh_each_device_runs_it_on_what_it_has(heads, monkeypatch):
    """Three heads are not divided: both devices of a row of the mesh have all."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    monkeypatch.setattr(mosaic_tpu, "unsupported", lambda *facts, basis: None)
    monkeypatch.setattr(mosaic_tpu, "encode", functools.partial(mosaic_tpu.encode, interpret=True))
    numbers, rule = drawn(2, heads, 16, 32), RULES["minmax4"]
    basis = jnp.asarray(np.linalg.qr(np.random.default_rng(1).normal(size=(heads, 32, 32)))[0], jnp.float32)
    assert choose(numbers, rule, mesh=mesh).name == "mosaic_tpu"
    ours = jax.jit(functools.partial(encode, rule=rule, mesh=mesh))(numbers, basis=basis)
    assert_same(ours, by_reference(numbers, rule, basis), most=1e-3)


@pytest.mark.parametrize(
    ("bits", "slots", "heads", "size", "expected"),
    [
        (8, 8192, 8, 128, (2048, 1, 128)),
        (8, 8192, 8, 256, (1024, 1, 128)),
        (4, 128, 8, 128, (128, 8, 128)),
        (3, 512, 6, 64, (512, 3, 256)),
        (3, 256, 1, 1024, (256, 1, 256)),
    ],
)
def test_blocks_are_long_or_have_several_heads(bits, slots, heads, size, expected):
    found = mosaic_tpu.blocks_for(bits, num_slots=slots, num_heads=heads, size=size)
    assert (found.tokens, found.heads, found.piece) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "NVIDIA H200"}, "it runs on TPUs, and this is NVIDIA H200"),
        ({"rule": Integers(bits=2, token_group=12)}, "12 tokens share scales, and not 8, 16, 32, 64 or 128"),
        ({"rule": Integers(bits=2, channel_group=12)}, "groups of 12 channels, of 128, are no multiples of 8"),
        ({"dtype": jnp.float16}, "numbers are float16"),
        ({"shape": (1, 1, 128, 2048)}, "tokens have more than 1024 numbers"),
        ({"basis": (1, 1, 128, 96)}, "each sequence has a transform of its own"),
    ],
)
def test_what_is_not_served_says_why(changes, reason):
    given = {"shape": (1, 1, 128, 128), "dtype": jnp.float32, "rule": RULES["int8"], "device": CHIP} | changes
    assert reason in mosaic_tpu.unsupported(**given)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pieces_fill_tiles_of_bytes(bits):
    assert all(mosaic_tpu.piece_of(bits) * width // 8 % 32 == 0 for width in plane_bits(bits))


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_it_compiles_for(topology):
    assert compile_cases("kernels_pallas.encode.cases", topology) == [case.name for case in CASES]
