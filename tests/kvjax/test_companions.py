"""What runs beside a selection: whose budget and settings, in which order, and nothing twice."""

import pytest

from kvjax.companions import frame_of, is_oracle, oracle_at, with_companions
from kvjax.grammar import parse_policy
from kvjax.oracle import Oracle
from kvjax.policy import FULL
from tests.contract.selections import PATTERN

EXACT = "exact(sinks=2,window=8,round=8)"


def names(*policies):
    return [str(policy) for policy in with_companions(list(map(parse_policy, policies)))]


def test_full_comes_first_then_companions_then_the_policies():
    asked = f"snapkv(budget=64,queries=16)+int4+{EXACT}"
    frame = f"(budget=64)+{EXACT}"
    assert names(asked) == ["full", f"random{frame}", f"streaming{frame}", f"oracle{frame}", asked]


def test_policies_of_one_budget_and_settings_share_their_companions():
    asked = [f"h2o(budget=64)+{EXACT}", f"keydiff(budget=64)+{EXACT}+int4", f"h2o(budget=32)+{EXACT}"]
    found = names(*asked)
    frames = f"(budget=64)+{EXACT}", f"(budget=32)+{EXACT}"
    companions = [f"{name}{frame}" for frame in frames for name in ("random", "streaming", "oracle")]
    assert found == ["full", *companions, *asked]


@pytest.mark.parametrize("settings", ["edges(1)", "prompt(100)", "prompt(inside)", "exact(sinks=4,window=16)"])
def test_settings_that_decide_what_may_go_are_theirs_too(settings):
    frame = f"(budget=256)+{settings}"
    assert frame_of(parse_policy(f"h2o(budget=256)+{settings}+int8")) == frame
    assert oracle_at(frame) == f"oracle{frame}"
    assert oracle_at(None) is None


@pytest.mark.parametrize("settings", ["layers(pyramid)", "heads(adaptive)", "protect(values=0.1)"])
def test_a_methods_own_way_with_its_budget_is_not(settings):
    assert frame_of(parse_policy(f"h2o(budget=64)+{settings}+{EXACT}")) == f"(budget=64)+{EXACT}"


def test_a_share_of_the_tokens_is_a_budget():
    assert frame_of(parse_policy("h2o(budget=0.25)")) == "(budget=0.25)"
    assert names("h2o(budget=0.25)")[1:4] == [f"{name}(budget=0.25)" for name in ("random", "streaming", "oracle")]


@pytest.mark.parametrize("policy", ["full", "int4", "quest(budget=256,page=16)", f"duo(pattern={PATTERN})"])
def test_where_companions_would_evict_nothing_there_are_none(policy):
    assert frame_of(parse_policy(policy)) is None
    assert names(policy) == list(dict.fromkeys(["full", policy]))


def test_companions_have_no_codec_and_their_names_parse():
    found = with_companions([parse_policy(f"h2o(budget=64)+turboquant(bits=2)+edges(1)+{EXACT}")])
    full, *companions, asked = found
    assert {policy.keys: policy.values for policy in (full, *companions)} == {FULL["keys"]: FULL["values"]}
    assert asked.keys != FULL["keys"]
    for policy in (full, *companions[:2]):
        assert parse_policy(str(policy)) == policy
    for policy in companions:
        assert (policy.exact, policy.edges, policy.selection.budget) == (asked.exact, 1, 64)
    assert [is_oracle(policy) for policy in found] == [False, False, False, True, False]
    assert isinstance(companions[2].selection, Oracle)


def test_nothing_comes_twice():
    asked = [f"random(budget=64)+{EXACT}", "full", f"h2o(budget=64)+{EXACT}", f"h2o(budget=64)+{EXACT}", "int4"]
    found = names(*asked)
    assert len(found) == len(set(found)) == 6
    assert found[-2:] == [f"h2o(budget=64)+{EXACT}", "int4"]
    assert names() == ["full"]
