"""Policies are static, hashable, and typed as strings; whatever cannot be is refused with the way out."""

import pytest

from kvjax.codec import ExactSizes
from kvjax.errors import UserError
from kvjax.policy import Policy, parse_policy, split_policies


def test_strings_and_policies_are_taken():
    assert parse_policy("full") == parse_policy(" full ") == parse_policy(Policy()) == Policy()
    assert hash(parse_policy("full")) == hash(Policy())
    assert str(Policy()) == "full"


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "turboquant(bits=4)",
        "turboquant(bits=2.5,rotation=dense)",
        "kivi(bits=2)+exact(sinks=4,window=128)",
        "key(turboquant,bits=4)+value(int4)+edges(2)",
        "key(int8)+exact(round=64)",
    ],
)
def test_the_text_of_a_policy_reads_back_as_the_same_policy(text):
    policy = parse_policy(text)
    assert policy.text == text
    assert parse_policy(str(policy)) == policy
    assert hash(policy) == hash(parse_policy(f" {text} "))


def test_codecs_for_both_and_apart():
    both, apart = parse_policy("int4"), parse_policy("key(int4)+value(int4)")
    assert (both.keys, both.values) == (apart.keys, apart.values)
    assert both.keys.role == "keys"
    assert both.values.role == "values"
    keys_alone = parse_policy("key(int8)")
    assert keys_alone.values == Policy().values
    assert keys_alone.keys == parse_policy("int8").keys


def test_the_exact_segment_is_the_codecs_own_unless_the_policy_says_otherwise():
    assert parse_policy("int4").exact == ExactSizes(sinks=4, window=128, round=128)
    assert parse_policy("kivi").exact == ExactSizes(sinks=0, window=0, round=128)
    assert parse_policy("oscar").exact == ExactSizes(sinks=64, window=256, round=128)
    assert parse_policy("kivi+exact(window=64)").exact == ExactSizes(sinks=0, window=64, round=128)


def test_edges_stay_uncompressed():
    policy = parse_policy("int4+edges(1)")
    plain = (Policy().keys, Policy().values)
    assert [policy.codecs(layer, 4) == plain for layer in range(4)] == [True, False, False, True]
    with pytest.raises(UserError, match=r"edges\(2\) leaves none .* at most 1"):
        parse_policy("int4+edges(2)").codecs(0, 4)


def test_the_body_holds_what_the_exact_segment_cannot():
    policy = parse_policy("int4+exact(sinks=4,window=16,round=8)")
    assert [policy.body_slots(tokens) for tokens in (1, 28, 29, 36, 37)] == [0, 0, 8, 8, 16]


def test_lists_of_policies_split_outside_parentheses():
    listed = "full;int8, turboquant(bits=4,rotation=dense)+edges(1);"
    assert split_policies(listed) == ["full", "int8", "turboquant(bits=4,rotation=dense)+edges(1)"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("", "A policy is a string such as 'full'"),
        (3, "A policy is a string such as 'full'"),
        (None, "A policy is a string such as 'full'"),
        ("int9", "Unknown policy term 'int9'. Did you mean 'int"),
        ("turbquant(bits=4)", "Unknown policy term 'turbquant'. Did you mean 'turboquant'"),
        ("int8(bit=4)", "Unknown argument of int8 'bit'"),
        ("turboquant(bits=5)", r"turboquant\(bits\) is 5.0; it must be one of 1, 2, 2.5, 3, 3.5, 4. The nearest is 4"),
        ("turboquant(bits=two)", r"turboquant\(bits\) is 'two'; it must be a number"),
        ("kivi(bits=9)", r"kivi\(bits\) is 9; .* The nearest is 8"),
        ("int4(rotation=hadamar)", r"int4\(rotation\) is hadamar; .* The nearest is hadamard"),
        ("int4(hadamard)", "int4 takes arguments by name"),
        ("int4(rotation=none,rotation=dense)", "gives rotation twice"),
        ("int8+int4", "two codecs for keys"),
        ("int8+value(int4)", "two codecs for values"),
        ("key()", r"key\(\.\.\.\) begins with a codec"),
        ("exact(sinks=4)", "names no codec; .*'full\\+exact"),
        ("int8+exact(4)", "exact takes sinks, window and round by name"),
        ("int8+exact(sink=4)", "Unknown argument of exact 'sink'. Did you mean 'sinks'"),
        ("int8+exact(window=-1)", r"exact\(window\) is -1; it must be at least 0"),
        ("kivi+exact(round=40)", r"exact\(round\) is 40; .* multiple of 32. The nearest is 32"),
        ("int2+exact(round=12)", "multiple of 8. The nearest is 16|multiple of 8. The nearest is 8"),
        ("int8+edges(x)", "edges takes one whole number"),
        ("int8+edges(1)+edges(1)", "edges twice"),
        ("full(bits=2)", "full takes no arguments"),
        ("int4(rotation=dense", "is no term of a policy"),
        ("lowrank", "either rank=R or energy=SHARE"),
        ("lowrank(energy=2)", r"lowrank\(energy\) is 2.0; it must be at least 0.01 and at most 1.0"),
        ("think(ratio=1)", r"think\(ratio\) is 1.0; it must be at least 0.0 and below 1.0"),
    ],
)
def test_others_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_policy(wrong)
    assert "\n" not in str(caught.value)
