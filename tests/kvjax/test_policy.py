"""Policies are static and hashable, and say how many slots a layer has and how many tokens a head keeps."""

import itertools

import pytest

from kvjax.errors import UserError
from kvjax.grammar import parse_policy
from kvjax.model_shape import ModelShape
from kvjax.policy import BodyPlan, Layers, Policy

SHAPE = ModelShape(num_layers=4, num_query_heads=8, num_kv_heads=2, head_size=64, dtype="float32", vocab_size=64)
TOKENS = 4096
EXACT = "+exact(sinks=4,window=16,round=64)"


def plans(text, *, max_tokens=TOKENS, shape=SHAPE):
    policy = parse_policy(text)
    return [policy.plan(layer, shape=shape, max_tokens=max_tokens) for layer in range(shape.num_layers)]


def quotas(text, **rest):
    return [plan.quota for plan in plans(text, **rest)]


def test_policies_hash_and_print():
    assert hash(Policy()) == hash(Policy())
    assert str(Policy()) == "full"
    assert {parse_policy("snapkv"), parse_policy("snapkv()")} == {parse_policy("snapkv")}
    assert parse_policy("snapkv(budget=512)") != parse_policy("snapkv(budget=513)")


def test_edges_stay_uncompressed():
    policy = parse_policy("int4+edges(1)")
    plain = (Policy().keys, Policy().values)
    assert [policy.codecs(layer, 4) == plain for layer in range(4)] == [True, False, False, True]
    with pytest.raises(UserError, match=r"edges\(2\) leaves none .* at most 1"):
        parse_policy("int4+edges(2)").codecs(0, 4)


def test_parts_are_of_the_layers_between_the_edges():
    policy = parse_policy("int2+int4(part=1/2)+edges(1)")
    four, two, full = (parse_policy(text).codecs(0, 1) for text in ("int4", "int2", "full"))
    assert [policy.codecs(layer, 7) for layer in range(7)] == [full, four, four, four, two, two, full]
    assert [policy.codecs(layer, 4) for layer in range(4)] == [full, four, two, full]
    with pytest.raises(UserError, match="parts layers by 2, and the model has 1 to compress"):
        policy.codecs(1, 3)


def test_groups_of_tokens_suit_the_codecs_of_all_parts():
    policy = parse_policy("snapkv(budget=100)+int4+key(kivi,part=2/2)+exact(sinks=4,window=28,round=32)")
    assert [policy.plan(layer, shape=SHAPE, max_tokens=1000).unit for layer in (0, SHAPE.num_layers - 1)] == [32, 32]


def test_the_body_holds_what_the_exact_segment_cannot():
    policy = parse_policy("int4+exact(sinks=4,window=16,round=8)")
    assert [policy.body_slots(tokens) for tokens in (1, 28, 29, 36, 37)] == [0, 0, 8, 8, 16]


def test_groups_fill_tiles_of_eight_where_that_adds_next_to_nothing():
    """Of 32 tokens, which share scales; pages stay whole."""
    kivi = parse_policy("kivi(bits=2)")
    assert [kivi.plan(0, shape=SHAPE, max_tokens=tokens).slots for tokens in (32_768, 600)] == [32_768, 512]
    assert kivi.plan(0, shape=SHAPE, max_tokens=32_768).quota == 32_640
    pages = parse_policy("quest(page=96)+kivi+exact(sinks=4,window=128,round=96)")
    for tokens in range(1000, 60_000, 777):
        plan = pages.plan(0, shape=SHAPE, max_tokens=tokens)
        assert plan.slots % 96 == 0
        assert plan.quota <= plan.slots <= 1.01 * plan.quota


def test_what_keeps_all_tokens_has_room_for_all():
    """Codecs alone, a selection that only reads less, and the layers at the edges."""
    for text in ("int4" + EXACT, "quest(budget=512)" + EXACT):
        policy = parse_policy(text)
        assert not policy.evicts
        assert plans(text) == [BodyPlan(slots=4032, quota=4032)] * 4
    edged = plans("h2o(budget=512)+edges(1)" + EXACT)
    assert edged[0] == edged[3] == BodyPlan(slots=4032, quota=4032)
    assert edged[1] == edged[2] == BodyPlan(slots=496, quota=492)
    policy = parse_policy("h2o(budget=512)+edges(1)")
    assert [policy.selection_of(layer, 4) is None for layer in range(4)] == [True, False, False, True]


@pytest.mark.parametrize("budget", [20, 21, 27, 28, 29, 512, 1000])
def test_a_quota_is_the_budget_without_sinks_and_window(budget):
    for plan in plans(f"h2o(budget={budget}){EXACT}"):
        assert plan.quota == budget - 20
        assert plan.slots == max(-(-(budget - 20) // 8) * 8, 8)
        assert (plan.pooled, plan.unit) == (False, 1)


def test_budgets_beyond_all_tokens_take_no_more_room_than_these():
    for text in (f"h2o(budget=100000){EXACT}", f"h2o(budget=1.0){EXACT}", f"h2o(budget=512)+prompt(99999){EXACT}"):
        assert {plan.slots for plan in plans(text)} == {4032}
    assert {plan.slots for plan in plans(f"adakv(budget=100000)+prompt(9){EXACT}")} == {2 * 4032}
    assert plans(f"h2o(budget=512){EXACT}", max_tokens=84) == [BodyPlan(slots=0, quota=0)] * 4
    assert plans(f"h2o(budget=512){EXACT}", max_tokens=85) == [BodyPlan(slots=64, quota=64)] * 4


def test_shares_are_of_max_tokens():
    """Rounded to a whole token: 0.25 of 4,098 are 1,024.5, of 4,099 they are 1,024.75."""
    assert quotas(f"h2o(budget=0.25){EXACT}") == [1024 - 20] * 4
    assert quotas(f"h2o(budget=0.25){EXACT}", max_tokens=4098) == [1024 - 20] * 4
    assert quotas(f"h2o(budget=0.25){EXACT}", max_tokens=4099) == [1025 - 20] * 4
    with pytest.raises(UserError, match="A budget of 4 tokens is smaller than what is protected") as caught:
        plans(f"h2o(budget=0.001){EXACT}")
    assert "\n" not in str(caught.value)


def test_granules_stay_whole():
    """Tokens that share a scale come and go together: quotas and slots are multiples of kivi's group."""
    for group, budget in itertools.product((4, 16, 32, 64), (20, 51, 52, 100, 511)):
        for plan in plans(f"h2o(budget={budget})+kivi(group={group}){EXACT}"):
            assert plan.unit == group
            assert plan.quota == (budget - 20) // group * group
            assert plan.slots == max(-(-plan.quota // max(group, 8)) * max(group, 8), max(group, 8))
    (plan, *_) = plans(f"adakv(budget=100)+kivi(group=32)+prompt(10){EXACT}")
    assert plan == BodyPlan(slots=192, quota=64, pooled=True, unit=32)  # 2 (64 + 32): each head pins whole groups


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 5, 7, 28, 32, 61, 80])
def test_a_pyramid_sums_to_its_mean(num_layers):
    """Exactly, and falls in steps that are equal to within a token."""
    for beta, mean in itertools.product((1.0, 1.5, 2.0, 7.3, 20.0, 1e6), (0, 1, 2, 3, 17, 492, 1023, 99999)):
        layers = Layers(kind="pyramid", beta=beta)
        shares = [layers.spread(mean, index, num_layers) for index in range(num_layers)]
        assert sum(shares) == mean * num_layers
        assert min(shares) >= 0
        if num_layers > 1:
            step = 2 * (mean - mean / beta) / (num_layers - 1)
            exact = [2 * mean - mean / beta - step * index for index in range(num_layers)]
            assert max(abs(one - other) for one, other in zip(shares, exact, strict=True)) <= 1


def test_the_pyramid_spreads_what_is_left_between_edges():
    assert quotas(f"h2o(budget=512)+layers(pyramid,beta=20){EXACT}") == [959, 648, 336, 25]
    assert sum(quotas(f"h2o(budget=512)+layers(pyramid,beta=20){EXACT}")) == 4 * 492
    shape = ModelShape(num_layers=8, num_query_heads=8, num_kv_heads=2, head_size=64, dtype="float32", vocab_size=64)
    inner = quotas(f"h2o(budget=511)+layers(pyramid)+edges(2){EXACT}", shape=shape)
    assert inner[:2] == inner[-2:] == [4032, 4032]
    assert sum(inner[2:-2]) == 4 * 491
    assert inner[2:-2] == sorted(inner[2:-2], reverse=True)


def test_given_budgets():
    assert quotas(f"h2o+layers(512,256,100,20){EXACT}") == [492, 236, 80, 0]
    assert quotas(f"h2o+layers(0,256,100,0)+edges(1){EXACT}") == [4032, 236, 80, 4032]
    for wrong, count in (("512", 1), ("512,256,256", 3), ("512,256,256,256,256", 5)):
        with pytest.raises(UserError, match=rf"layers\({wrong}\) has {count} budgets; the model has 4 layers"):
            plans(f"h2o+layers({wrong}){EXACT}")


def test_a_prompt_adds_slots_and_no_quota():
    (plain, *_), (pinned, *_) = plans(f"h2o(budget=512){EXACT}"), plans(f"h2o(budget=512)+prompt(300){EXACT}")
    assert (plain.slots, pinned.slots) == (496, 792)
    assert plain.quota == pinned.quota == 492
    assert plans(f"h2o(budget=512)+prompt(inside){EXACT}")[0] == plain
    (pool, *_) = plans(f"adakv(budget=512)+prompt(300){EXACT}")
    assert (pool.slots, pool.quota) == (2 * 792, 492)


def test_a_pool_holds_all_heads():
    for heads in (1, 2, 8):
        shape = ModelShape(
            num_layers=4, num_query_heads=8, num_kv_heads=heads, head_size=64, dtype="float32", vocab_size=64
        )
        assert (
            plans(f"h2o(budget=511)+heads(adaptive){EXACT}", shape=shape)
            == [BodyPlan(slots=-(-491 * heads // 8) * 8, quota=491, pooled=True)] * 4
        )


def test_a_pool_is_as_large_as_the_heads_that_look_back(tmp_path):
    pattern = tmp_path / "pattern.tsv"
    pattern.write_text("1 0\n1 1\n0 0\n0.5 1\n")
    policy = f"duo(pattern={pattern},sparsity=0.5,budget=512){EXACT}"
    assert [plan.slots for plan in plans(policy)] == [496, 984, 8, 496]
    with pytest.raises(UserError, match=r"needs heads\(adaptive\), its default"):
        parse_policy(f"{policy}+heads(uniform)")


def test_the_longest_prompt_that_can_be_pinned():
    def most(text, max_tokens=TOKENS):
        return parse_policy(text + EXACT).most_pinned(shape=SHAPE, max_tokens=max_tokens)

    assert most("h2o(budget=512)") is None
    assert most("h2o(budget=512)+prompt(300)") == 300
    assert most("h2o(budget=512)+prompt(inside)") == 4 + 492
    assert most("h2o(budget=512)+prompt(inside)+kivi(group=32)") == 4 + 480
    assert most("h2o(budget=512)+prompt(inside)+layers(pyramid)") == 4 + 25
    assert most("h2o+prompt(inside)+layers(0,256,100,0)+edges(1)") == 4 + 80
    assert most("h2o(budget=512)+prompt(inside)", max_tokens=84) == 84
    with pytest.raises(UserError, match=r"edges\(2\) leaves none"):
        most("h2o(budget=512)+prompt(inside)+edges(2)")
