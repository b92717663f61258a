"""Empty caches: what is made for a policy, and what it takes."""

import jax
import numpy as np
import pytest

from kvjax.accounting import account, device_bytes
from kvjax.empty import abstract_cache, empty_cache, fit_policy
from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.sharding import Placement
from tests.contract.codecs import model, statistics
from tests.contract.selections import PATTERN

EXACT = "+exact(sinks=4,window=28,round=32)"
SHAPE = model().cache_shape


def made(policy, *, max_tokens=4096, batch=1):
    sizes = {"batch": batch, "max_tokens": max_tokens, "statistics": statistics()}
    return empty_cache(SHAPE, policy=parse_policy(policy + EXACT), **sizes)


def test_a_budget_is_what_is_allocated_however_many_tokens_may_come():
    small, large = (made("knorm(budget=256)", max_tokens=tokens) for tokens in (4096, 1_000_000))
    assert device_bytes(small.layers) == device_bytes(large.layers)
    body, exact = small.layers[0].body, small.layers[0].exact
    assert body.num_slots == 256 - 32
    assert exact.num_slots == 64
    assert body.positions.shape == (1, 2, 224)


def test_uneven_budgets_take_no_more_bytes_than_even_ones():
    """The pool of heads(adaptive) has as many slots as its heads would have apart; its owners are its only extra."""
    even, pooled = (made(policy) for policy in ("snapkv(budget=256)", "adakv(budget=256)"))
    slots = even.layers[0].body.num_slots
    assert pooled.layers[0].body.num_slots == 2 * slots
    assert pooled.layers[0].body.keys[0].planes[0].shape == (1, 1, 2 * slots, 16)
    ours, theirs = device_bytes(pooled.layers[0].body), device_bytes(even.layers[0].body)
    assert ours == theirs + 2 * slots * 4
    pyramid = made("pyramidkv(budget=256)")
    sizes = [layer.body.num_slots for layer in pyramid.layers]
    assert sizes[0] > slots > sizes[1]
    assert abs(sum(sizes) - 2 * slots) <= 16  # whole bytes of each layer


def test_heads_that_do_not_look_back_take_no_slots():
    duo, full = made(f"duo(pattern={PATTERN},sparsity=0.5)"), made("none")
    assert duo.layers[0].body.num_slots == full.layers[0].body.num_slots  # of two heads one
    assert device_bytes(duo.layers[0].body.keys) == device_bytes(full.layers[0].body.keys) / 2
    none = made(f"duo(pattern={PATTERN},sparsity=1.0)")
    assert none.layers[0].body.num_slots == 8  # the least there is
    all_heads = made(f"duo(pattern={PATTERN},sparsity=0.0)")
    assert device_bytes(all_heads.layers[0].body.keys) == device_bytes(full.layers[0].body.keys)


def test_codecs_and_budgets_multiply():
    plain, coded = (account(made(policy)) for policy in ("knorm(budget=1024)", "knorm(budget=1024)+int4"))
    assert plain["ratio_to_dtype"] == pytest.approx(4096 / (1024 + 32), rel=0.05)
    assert coded["layers"][0]["key_bits"] == pytest.approx(4 + 16 / 16)
    # 5 of 32 bits a number; a position for each 16 keys and 16 values is a 32nd; 64 slots stay exact
    slots = 992 * (5 / 32 + 1 / 32) + 64
    assert coded["ratio_to_dtype"] == pytest.approx(4096 / slots, rel=0.01)


def test_the_abstract_cache_is_the_same():
    for policy in ("h2o(budget=256)+int4", "adakv(budget=256)", "quest(budget=256)"):
        described = abstract_cache(
            SHAPE, policy=parse_policy(policy + EXACT), batch=1, max_tokens=4096, statistics=statistics()
        )
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made(policy))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), described) == found


def test_policies_are_fitted_layer_by_layer():
    static, fitted = fit_policy(SHAPE, parse_policy("triattention+edges(0)"), Placement(), statistics())
    assert [layer[2].layer for layer in static] == [0, 1]
    assert fitted[0][2]["real"].shape == (4, 8)
    assert not np.array_equal(fitted[0][2]["real"], fitted[1][2]["real"])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("triattention", "This policy needs statistics of the model's queries"),
        ("expected_attention(of=calibration)", "This policy needs statistics of the model's queries"),
        ("knorm(budget=0.001)", "A budget of 4 tokens is smaller than what is protected"),
        ("knorm+layers(64,64,64)", "has 3 budgets; the model has 2 layers"),
        ("knorm+layers(64,8)", "A budget of 8 tokens is smaller than what is protected"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(policy, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as caught:
        empty_cache(SHAPE, policy=parse_policy(policy + EXACT), batch=1, max_tokens=4096)
    assert "\n" not in str(caught.value)


def test_parts_of_the_layers_take_what_their_codecs_take():
    cache = made("int2+key(int8,part=1/2)")
    bits = [(layer["key_bits"], layer["value_bits"]) for layer in account(cache)["layers"]]
    (wide, narrow), last = bits[0], len(bits) - 1
    assert bits[: len(bits) // 2] == [(wide, narrow)] * (len(bits) // 2)
    assert bits[last] == (narrow, narrow)
    assert wide == narrow + 6
