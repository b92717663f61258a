"""Names of policies in pictures."""

import pytest

from kvjax.pictures.names import fold, names_of
from tests.kvjax.pictures.made_up import EXACT, POLICIES


def test_what_all_share_is_said_once():
    names = names_of(POLICIES)
    assert names.common == EXACT[1:]
    assert list(names.short.values()) == [
        "full",
        "random(budget=64)",
        "oracle(budget=64)",
        "triattention(budget=64)+int4",
    ]
    assert list(names.families.values()) == ["full", "random", "oracle", "triattention + int4"]
    assert names.methods["triattention + int4"] == "triattention"


def test_settings_that_differ_are_said():
    names = names_of(["full", "h2o(budget=64)+heads(adaptive)", "h2o(budget=32)", "int4+edges(1)"])
    assert names.common == ""
    assert list(names.families.values()) == ["full", "h2o + heads(adaptive)", "h2o", "int4 + edges(1)"]
    assert names.short["int4+edges(1)"] == "int4+edges(1)"


@pytest.mark.parametrize(
    ("policy", "family", "method"),
    [
        ("key(turboquant,bits=4)+value(int4)", "turboquant/int4", "turboquant"),
        ("key(int2)+key(int4,part=1/2)+value(int4)", "int2+int4/int4", "int2"),
        ("int2+int4(part=1/2)", "int2 + int4", "int2"),
        ("key(int8)", "int8/full", "int8"),
        ("int4+h2o(budget=64)", "int4 + h2o", "h2o"),
        ("kivi(bits=2)", "kivi", "kivi"),
        ("full", "full", "full"),
    ],
)
def test_families_have_no_numbers(policy, family, method):
    names = names_of([policy, "full"])
    assert names.families[policy] == family
    assert names.methods[family] == method


def test_no_policies_have_no_names():
    assert names_of([]).short == {}


def test_long_names_break_at_their_joints():
    assert fold("snapkv(budget=64,queries=16)+int4", 20) == "snapkv(budget=64,\nqueries=16)+int4"
    assert fold("triattention(budget=64)", 15) == "triattention\n(budget=64)"
    assert fold("h2o(budget=64)+int4", 15) == "h2o(budget=64)\n+int4"
    assert fold("int4", 2) == "int4"
