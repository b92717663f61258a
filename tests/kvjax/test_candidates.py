"""Candidates: what choices spell is a policy, keys have at least the bits of values, and kinds are told apart."""

import itertools

import pytest

from kvjax.candidates import LAYERS, Space
from kvjax.errors import UserError
from kvjax.grammar import parse_policy

SPACE = Space(
    selections=("keydiff", "snapkv(queries=16)"), codecs=("int8", "turboquant(bits=3)", "int2"), windows=(8, 16)
)
PLAIN = {
    "selection": "",
    "keys": "full",
    "values": 0,
    "layers": "even",
    "edges": 0,
    "window": 8,
    "budgets": "uniform",
    "share": 1.0,
}


def spell(budget=None, **changes):
    return SPACE.spell({**PLAIN, **changes}, budget=budget)


@pytest.mark.parametrize(
    ("policy", "kind", "choices"),
    [
        ("full", "codec", {"window": 16}),
        ("int8+exact(sinks=4,window=8,round=8)", "codec", {"keys": "int8"}),
        ("int2+exact(sinks=4,window=8,round=8)", "codec", {"keys": "int2", "values": 2}),
        (
            "key(int8)+value(turboquant,bits=3)+exact(sinks=4,window=16,round=16)+edges(1)",
            "mixed",
            {"keys": "int8", "values": 1, "window": 16, "edges": 1},
        ),
        (
            "int2+turboquant(bits=3,part=1/2)+exact(sinks=4,window=8,round=8)",
            "mixed",
            {"keys": "int2", "layers": "first"},
        ),
        (
            "key(full)+value(int8)+full(part=2/2)+exact(sinks=4,window=8,round=8)",
            "mixed",
            {"values": 1, "layers": "last"},
        ),
        (
            "keydiff(budget=0.25)+exact(sinks=4,window=8,round=8)",
            "selection",
            {"selection": "keydiff", "layers": "first"},
        ),
        (
            "snapkv(budget=0.25,queries=16)+int8+exact(sinks=4,window=8,round=8)+layers(pyramid)",
            "mixed",
            {"selection": "snapkv(queries=16)", "keys": "int8", "budgets": "pyramid"},
        ),
    ],
)
def test_choices_spell_policies(policy, kind, choices):
    assert spell(budget=0.25, **choices) == policy
    assert str(parse_policy(policy)) == policy
    assert SPACE.kind({**PLAIN, **choices}) == kind


def test_every_choice_of_codecs_is_a_policy_and_keys_have_the_bits_of_values_at_least():
    steps = {codec: step for step, text in enumerate(SPACE.codecs) for codec in parse_policy(text).all_codecs}
    for keys, down, layers in itertools.product(SPACE.axes()["keys"], SPACE.axes()["values"], LAYERS):
        policy = parse_policy(spell(keys=keys, values=down, layers=layers))
        for layer in range(4):
            key, value = policy.codecs(layer, 4)
            assert steps[key] <= steps[value]


def test_a_search_starts_with_what_is_the_same_everywhere():
    starts = SPACE.starts()
    assert [SPACE.kind(choices) for choices in starts] == ["codec"] * 3 + ["selection"] * 2
    axes = SPACE.axes()
    assert all(choices[name] in axes[name] for choices in starts for name in axes)


def test_near_a_codec_are_half_way_houses_and_near_a_selection_each_codec():
    starts = SPACE.starts()
    exact = "+exact(sinks=4,window=8,round=8)"
    codec, selection = ([SPACE.spell(near, budget=0.5) for near in SPACE.near(start)] for start in starts[2:4])
    assert codec == [
        f"key(turboquant,bits=3)+value(int2){exact}",
        f"int2+turboquant(bits=3,part=1/2){exact}",
        f"int2+turboquant(bits=3,part=2/2){exact}",
        "int2+exact(sinks=4,window=16,round=16)",
    ]
    assert selection == [
        *(f"keydiff(budget=0.5)+{name}{exact}" for name in SPACE.codecs[1:]),
        "keydiff(budget=0.5)+exact(sinks=4,window=16,round=16)",
    ]
    assert len(SPACE.near(starts[0])) == 1  # the one with more bits is the uncompressed cache


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"selections": ("h2o(budget=64)",), "codecs": ()}, "'h2o\\(budget=64\\)' has a budget"),
        ({"selections": (), "codecs": ()}, "nothing to choose from"),
        ({"selections": ("h2o(",), "codecs": ()}, "is no term of a policy"),
    ],
)
def test_others_are_refused(space, message):
    with pytest.raises(UserError, match=message):
        Space(**space)
