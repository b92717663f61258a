"""Bits, bytes and rounds of caches against sums by hand, on one device and on many."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvjax
from kvjax.accounting import account, bytes_per_token, device_bytes, full_cache_bytes, num_rounds
from kvjax.empty import empty_cache
from kvjax.grammar import parse_policy
from kvjax.model_shape import ModelShape
from kvjax.sharding import Placement, make_mesh
from tests.tiny import tiny_model

SHAPE = ModelShape(num_layers=3, num_query_heads=8, num_kv_heads=4, head_size=64, dtype="bfloat16", vocab_size=64)
UNCOMPRESSED = 3 * 2 * 2 * 4 * 600 * 64 * 2  # layers, keys and values, rows, heads, tokens, numbers, bytes of SHAPE


def make(policy, *, shape=SHAPE, **changes):
    return empty_cache(shape, policy=parse_policy(policy), **{"batch": 2, "max_tokens": 600, **changes})


def stated(exact_slots, body_slots, key_bits, value_bits, exact_bits=16):
    """Bytes of three layers of two rows of four heads of 64 numbers."""
    return 3 * (2 * 4 * 64) * (body_slots * (key_bits + value_bits) + exact_slots * 2 * exact_bits) / 8


@pytest.mark.parametrize(
    ("policy", "slots", "bits"),
    [
        ("int8", (4 + 128 + 128, 3 * 128), (8 + 16 / 64, 8 + 16 / 64)),  # 340 tokens beyond the exact ones
        ("kivi(bits=2)", (128, 4 * 128), (2 + 32 / 32, 2 + 32 / 32)),  # 472
        ("turboquant(bits=4)", (260, 384), (4 + 16 / 64, 4 + 16 / 64)),
        ("key(int8)+value(int4)+exact(sinks=0,window=8,round=32)", (40, 18 * 32), (8.25, 4.25)),  # 560
        ("full", (128, 4 * 128), (16, 16)),
    ],
)
def test_stated_bytes_by_hand(policy, slots, bits):
    """Body slots at the codec's bits, scales counted, and exact slots at the dtype's."""
    found = account(make(policy))
    assert (found["key_bits"], found["value_bits"]) == bits
    assert found["stated_bytes"] == stated(*slots, *bits)
    assert [(layer["exact_slots"], layer["body_slots"]) for layer in found["layers"]] == [slots] * 3


def test_a_cache_without_a_body_is_stated_at_the_dtypes_bits():
    """Whatever the codec: 100 tokens are all exact."""
    for policy in ("int8", "full"):
        found = account(make(policy, max_tokens=100))
        assert (found["key_bits"], found["stated_bytes"]) == (16.0, stated(100, 0, 0, 0))
        assert found["device_bytes"] == found["stated_bytes"] + 3 * 2 * 100 * 4  # positions
        assert found["layers"][0]["body_slots"] == 0


def test_device_bytes_are_the_buffers():
    """Beyond what is stated: positions, four bytes a slot and row, and a rotated codec's own arrays."""
    for policy, slots in (("int8", 260 + 384), ("kivi(bits=2)", 128 + 512), ("full", 640)):
        found = account(make(policy))
        assert found["device_bytes"] == found["stated_bytes"] + 3 * 2 * slots * 4
    cache = make("turboquant(bits=4)")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.layers))
    own = sum(leaf.nbytes for layer in cache.layers for leaf in jax.tree.leaves((layer.body.fitted, layer.body.chosen)))
    found = account(cache)
    assert found["device_bytes"] == device_bytes(cache.layers) == held
    assert held == found["stated_bytes"] + 3 * 2 * 644 * 4 + own


@pytest.mark.parametrize("policy", ["int8", "int4+edges(1)", "full"])
def test_layers_sum_to_the_whole_and_ratios_are_of_real_bytes(policy):
    for dtype, to_bfloat16 in (("bfloat16", 1.0), ("float32", 0.5)):
        cache = make(policy, shape=dataclasses.replace(SHAPE, dtype=dtype))
        found = account(cache)
        for name in ("stated_bytes", "device_bytes"):
            assert found[name] == sum(layer[name] for layer in found["layers"])
        assert full_cache_bytes(cache) == UNCOMPRESSED / to_bfloat16
        for part, share in ((found, 1), *((layer, 3) for layer in found["layers"])):
            assert part["ratio_to_dtype"] == pytest.approx(UNCOMPRESSED / to_bfloat16 / share / part["device_bytes"])
            assert part["ratio_to_bfloat16"] == pytest.approx(part["ratio_to_dtype"] * to_bfloat16)


def test_edges_show_the_bits_of_the_dtype():
    found = account(make("int8+edges(1)"))
    assert [layer["key_bits"] for layer in found["layers"]] == [16.0, 8.25, 16.0]
    assert [layer["value_bits"] for layer in found["layers"]] == [16.0, 8.25, 16.0]
    assert found["key_bits"] == pytest.approx((16 + 8.25 + 16) / 3)
    edge, inner, _ = found["layers"]
    assert edge["stated_bytes"] - inner["stated_bytes"] == (2 * 4 * 64) * 384 * 2 * (16 - 8.25) / 8


@pytest.mark.parametrize(("num_tokens", "seen"), [(1, [18, 20, 27]), (3, [18, 20, 29])])
def test_rounds_by_hand(num_tokens, seen):
    """2 + 8 + 8 tokens are exact, so the 19th, 27th, ... has a round before it; a row without new tokens has none."""
    policy = "int8+exact(sinks=2,window=8,round=8)"
    model = tiny_model(layers=1)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (3, 26)), jnp.int32)
    cache = kvjax.init_cache(model, policy, batch=3, max_tokens=42)
    assert num_rounds(cache) == 0
    _, cache = kvjax.prefill(model, cache, tokens, lengths=jnp.asarray([18, 19, 26]))
    assert num_rounds(cache) == 0 + 1 + 1
    lengths = jnp.asarray([0, 1, num_tokens])
    _, cache = kvjax.compressed_decode(model, cache, tokens[:, :num_tokens], lengths=lengths)
    np.testing.assert_array_equal(cache.num_seen, seen)
    assert num_rounds(cache) == 0 + 1 + 2
    moved = np.sum(np.asarray(cache.layers[0].body.positions) >= 0, axis=(1, 2))
    assert moved.tolist() == [0, 8, 16]


def test_a_cache_that_holds_all_tokens_exact_has_no_rounds():
    cache = make("int8", max_tokens=260)
    assert num_rounds(dataclasses.replace(cache, num_seen=cache.num_seen + 260)) == 0


def test_bytes_of_a_spread_cache_count_copies():
    """Four heads over two chips are cut, positions alone are there twice; over eight chips all is copied to each."""
    one, cut, copied = (
        make("int8", batch=4, placement=Placement(None if sizes is None else make_mesh(**sizes)))
        for sizes in (None, {"data": 4, "model": 2}, {"data": 1, "model": 8})
    )
    positions = 3 * 4 * 644 * 4
    assert device_bytes(cut.layers) == device_bytes(one.layers) + positions
    assert device_bytes(copied.layers) == 8 * device_bytes(one.layers)
    assert full_cache_bytes(one) == full_cache_bytes(cut) == 2 * UNCOMPRESSED  # twice the rows
    assert full_cache_bytes(copied) == 16 * UNCOMPRESSED
    ratios = [account(cache)["ratio_to_dtype"] for cache in (one, cut, copied)]
    assert ratios[0] == ratios[2] > ratios[1] > 0.99 * ratios[0]


def test_stated_bits_are_real_bytes_at_the_size_of_a_large_model(record_property):
    """One layer of Qwen3-8B's shape at 32,768 tokens: real bytes at most 3 % above the stated ones.

    And, where the exact tokens are few beside the rest, at most 3 % above all tokens at the codec's bits.
    """
    shape = ModelShape(num_layers=1, num_query_heads=32, num_kv_heads=8, head_size=128, dtype="bfloat16", vocab_size=64)
    names = ["int8", "fp8", "int4", "turboquant(bits=4)", "turboquant(bits=2)", "kivi(bits=4)", "kivi(bits=2)"]
    shown = []
    for name in names:
        found = account(make(name, shape=shape, batch=1, max_tokens=32_768))
        to_stated = found["device_bytes"] / found["stated_bytes"]
        ideal = 32_768 * 8 * 128 * (found["key_bits"] + found["value_bits"]) / 8
        to_ideal = found["device_bytes"] / ideal
        assert 1.0 <= to_stated <= 1.03
        assert to_ideal <= 1.03 or name == "turboquant(bits=2)"
        shown.append(f"{name} {to_stated:.4f} / {to_ideal:.4f} ({found['ratio_to_bfloat16']:.2f} times smaller)")
    listed = ", ".join(shown)
    record_property("print", f"real bytes over stated ones / over all tokens at the codec's bits: {listed}")


@pytest.mark.parametrize("policy", ["full", "int2+key(int8,part=1/3)", "snapkv(budget=0.3)+turboquant(bits=3)"])
def test_bytes_are_known_before_there_is_a_cache(policy):
    size, uncompressed = bytes_per_token(SHAPE, parse_policy(policy), max_tokens=600)
    cache = make(policy, batch=1)
    assert size == device_bytes(cache.layers) / 600
    assert uncompressed == full_cache_bytes(cache) / 600 == UNCOMPRESSED / 1200


def test_bytes_on_a_mesh_are_known_before_there_is_a_cache():
    placement = Placement(make_mesh(data=2, model=2))
    size, uncompressed = bytes_per_token(SHAPE, parse_policy("int4"), max_tokens=600, placement=placement)
    cache = make("int4", placement=placement)  # two rows
    assert (size, uncompressed) == (device_bytes(cache.layers) / 1200, full_cache_bytes(cache) / 1200)
