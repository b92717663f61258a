"""Slots moved as they lie in memory, against reading everything and indexing the numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.coded import Coded, Rotated, pack, read_parts
from kernels_pallas.slots import merge_heads, put_slots, take_slots

BATCH, HEADS, SLOTS, WIDTH = 2, 3, 48, 6
BITS = (1, 2, 3, 4, 8)
TURN = {"basis": None, "mean": None, "frequencies": (1.0, 0.1, 0.01)}


def coded(bits, scales, *, heads=HEADS, slots=SLOTS, group=16, seed=0):
    """Random numbers of a layout: bits None are floats; `scales` says what shares one."""
    generator = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    if bits is None:
        return Coded(planes=(normal(BATCH, heads, slots, WIDTH),))
    half = 1 << (bits - 1)
    codes = generator.integers(-half, half, (BATCH, heads, slots, WIDTH))
    shape = {"token": (slots,), "channels": (2, slots), "tokens": (slots // group, WIDTH), "none": None}[scales]
    rest = {} if shape is None else {name: normal(BATCH, heads, *shape) for name in ("scale", "offset")}
    return Coded(
        planes=pack(jnp.asarray(codes), bits), bits=bits, token_group=group if scales == "tokens" else 1, **rest
    )


def numbers(parts):
    return np.array(jax.jit(read_parts)(parts))


def leaves_equal(ours, theirs):
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert pairs
    return all(one.dtype == other.dtype and (one == other).all() for one, other in pairs)


def slots_of(units, unit):
    """Single slots of `B K units`; -1 where a unit is negative."""
    single = units[..., None] * unit + np.arange(unit)
    return np.where(units[..., None] >= 0, single, -1).reshape(*units.shape[:2], -1)


@functools.partial(jax.jit, static_argnames="unit")
def take(parts, index, unit=1):
    return take_slots(parts, index, unit=unit)


@functools.partial(jax.jit, static_argnames="unit")
def put(parts, new, slots, unit=1):
    return put_slots(parts, new, slots, unit=unit)


def drawn_units(count, of, *, heads=HEADS, seed=1):
    """Distinct units in any order."""
    generator = np.random.default_rng(seed)
    drawn = [[generator.permutation(of)[:count] for _ in range(heads)] for _ in range(BATCH)]
    return np.asarray(drawn, np.int32)


def check_take(parts, index, unit=1):
    taken = take(parts, jnp.asarray(index), unit=unit)
    whole, single = numbers(parts), np.maximum(slots_of(np.maximum(index, 0), unit), 0)
    single = single[:, :: index.shape[1] // whole.shape[1]]
    np.testing.assert_array_equal(numbers(taken), np.take_along_axis(whole, single[..., None], axis=2))
    return taken


def check_put(parts, new, units, unit=1):
    """The numbers are where they should be, and all other slots, and the new ones, keep their very codes."""
    units = jnp.asarray(units)
    done = put(parts, new, units, unit=unit)
    stored = parts[0].num_heads
    expected, fresh = numbers(parts), numbers(new)
    single = slots_of(np.asarray(units), unit)[:, :: units.shape[1] // stored]
    for b, head, place in np.ndindex(single.shape):
        if single[b, head, place] >= 0:
            expected[b, head, single[b, head, place]] = fresh[b, head, place]
    np.testing.assert_array_equal(numbers(done), expected)
    assert jax.tree.structure(done) == jax.tree.structure(parts)
    return done


@pytest.mark.parametrize(
    ("bits", "scales"), [*((bits, "token") for bits in BITS), (3, "none"), (2, "channels"), (3, "channels")]
)
def test_single_slots_of_codes(bits, scales):
    """Any order for each head, then 16 others into places that share bytes with neighbours that stay."""
    parts = (coded(bits, scales),)
    taken = check_take(parts, drawn_units(24, SLOTS))
    assert taken[0].bits == bits
    check_put(parts, (coded(bits, scales, slots=16, seed=5),), drawn_units(16, SLOTS, seed=2))


@pytest.mark.optimised
@pytest.mark.parametrize("bits", [1, 4])
def test_what_is_not_taken_is_not_unpacked(bits):
    """16 of 2**14 slots: temporaries are far below the codes that stay where they are."""
    plane = jax.ShapeDtypeStruct((1, 1, (1 << 14) * bits // 8, 64), jnp.int8)
    index = jax.ShapeDtypeStruct((1, 1, 16), jnp.int32)
    compiled = take.lower((Coded(planes=(plane,), bits=bits),), index).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < plane.size / 8


@pytest.mark.parametrize("bits", BITS)
def test_units_that_share_a_channels_scale(bits):
    """Units of 16 tokens with a scale for each channel: they move with their scales."""
    parts = (coded(bits, "tokens"),)
    check_take(parts, drawn_units(2, 3), unit=16)
    check_put(parts, (coded(bits, "tokens", slots=32, seed=5),), np.where(drawn_units(2, 3) == 1, -1, 2), unit=16)


@pytest.mark.parametrize(("bits", "unit"), [(2, 8), (4, 4), (3, 2)])
def test_units_of_which_several_share_a_channels_scale(bits, unit):
    """Pages within a group of 16: what is taken has scales for each unit; an odd number of units, too."""
    parts = (coded(bits, "tokens"), Rotated(parts=(coded(8, "tokens"),), **TURN))
    index = drawn_units(3 if unit > 2 else 12, SLOTS // unit)
    taken = take(parts, jnp.asarray(index), unit=unit)
    assert (taken[0].token_group, taken[1].parts[0].token_group) == (unit, unit)
    check_take(parts[:1], index, unit=unit)
    check_take(parts[1].parts, index, unit=unit)
    new = (coded(bits, "tokens", slots=16, seed=5),)
    with pytest.raises(ValueError, match=f"Units of {unit} slots share scales with others, 16 together"):
        put(parts[:1], new, jnp.asarray(drawn_units(16 // unit, SLOTS // unit)), unit=unit)
    with pytest.raises(ValueError, match="Units of 12 slots cross the borders of groups of 16 that share scales"):
        take(parts, jnp.asarray(drawn_units(2, 4)), unit=12)


@pytest.mark.parametrize(("bits", "unit"), [(1, 2), (1, 4), (2, 2), (3, 2), (3, 4), (4, 2), (3, 8)])
def test_units_smaller_than_a_byte(bits, unit):
    """Units of 2 or 4 tokens need not fill a byte of 1-bit codes."""
    parts = (coded(bits, "tokens", group=unit),)
    check_take(parts, drawn_units(16 // unit, SLOTS // unit), unit=unit)
    new = (coded(bits, "tokens", group=unit, slots=16, seed=5),)
    units = drawn_units(16 // unit, SLOTS // unit)
    units[0, 0, 0] = -1
    check_put(parts, new, units, unit=unit)


def test_floats():
    parts = (coded(None, "none"),)
    check_take(parts, drawn_units(5, SLOTS))
    check_put(parts, (coded(None, "none", slots=5, seed=5),), drawn_units(5, SLOTS, seed=2))
    check_take(parts, drawn_units(3, 12), unit=4)


def test_several_parts_at_once():
    """Floats beside codes, and keys from before RoPE, as codecs store them."""
    turned = Rotated(parts=(coded(4, "token"),), **TURN)
    parts, index = (coded(2, "channels"), coded(None, "none"), turned), drawn_units(16, SLOTS)
    taken = take(parts, jnp.asarray(index))
    positions = np.broadcast_to(np.arange(SLOTS), (BATCH, HEADS, SLOTS))
    whole = np.asarray(read_parts(parts, jnp.asarray(positions)))
    expected = np.take_along_axis(whole, index[..., None], axis=2)
    np.testing.assert_allclose(read_parts(taken, jnp.asarray(index)), expected, rtol=0, atol=1e-6)
    assert leaves_equal(put(parts, taken, jnp.asarray(index)), parts)


@pytest.mark.parametrize("bits", BITS)
def test_all_tokens_of_a_byte_are_replaced(bits):
    """Slots 8 to 15, in any order: whole bytes change, and every other byte is as it was."""
    parts, new = (coded(bits, "token"),), (coded(bits, "token", slots=8, seed=7),)
    order = 8 + drawn_units(8, 8)
    done = check_put(parts, new, order)
    for before, after in zip(parts[0].planes, done[0].planes, strict=True):
        per_byte = SLOTS // before.shape[2]
        kept = np.r_[0 : 8 // per_byte, 16 // per_byte : before.shape[2]]
        np.testing.assert_array_equal(after[:, :, kept], before[:, :, kept])
    assert leaves_equal(take(done, jnp.asarray(order)), new)


@pytest.mark.parametrize("bits", [1, 3, 8, None])
def test_negative_slots_are_dropped(bits):
    parts, new = (coded(bits, "token"),), (coded(bits, "token", slots=8, seed=3),)
    assert leaves_equal(put(parts, new, jnp.full((BATCH, HEADS, 8), -1)), parts)
    some = drawn_units(8, SLOTS)
    some[:, :, ::2] = -1
    check_put(parts, new, some)


def test_negative_indices_are_harmless():
    """Whatever they give is finite and of the right shape; the others are right."""
    index = drawn_units(8, SLOTS)
    index[:, :, 3] = -1
    taken = numbers(take((coded(3, "token"),), jnp.asarray(index)))
    whole = numbers((coded(3, "token"),))
    right = np.take_along_axis(whole, np.maximum(index, 0)[..., None], axis=2)
    np.testing.assert_array_equal(np.delete(taken, 3, axis=2), np.delete(right, 3, axis=2))
    assert np.isfinite(taken).all()


@pytest.mark.parametrize(("bits", "stored"), [(2, 1), (3, 2), (None, 2)])
def test_heads_that_share_stored_numbers(bits, stored):
    """Four heads in the index, one or two stored: the heads that share one agree."""
    index = np.repeat(drawn_units(8, SLOTS, heads=stored), 4 // stored, axis=1)
    parts = (coded(bits, "channels", heads=stored),)
    check_take(parts, index)
    check_put(parts, (coded(bits, "channels", heads=stored, slots=8, seed=4),), index)


@pytest.mark.parametrize(
    ("bits", "scales"), [(3, "none"), (3, "channels"), (3, "tokens"), (1, "token"), (8, "token"), (None, "none")]
)
def test_heads_merge_one_after_the_other(bits, scales):
    parts = (coded(bits, scales), coded(4, "token", seed=9))
    merged = jax.jit(merge_heads)(parts)
    expected = numbers(parts).reshape(BATCH, 1, HEADS * SLOTS, -1)
    np.testing.assert_array_equal(numbers(merged), expected)
    assert (merged[0].num_heads, merged[0].num_slots) == (1, HEADS * SLOTS)


def test_one_compilation_serves_every_index():
    function = jax.jit(take_slots)
    parts = (coded(2, "token"),)
    for seed in range(3):
        function(parts, jnp.asarray(drawn_units(8, SLOTS, seed=seed)))
    assert function._cache_size() == 1
