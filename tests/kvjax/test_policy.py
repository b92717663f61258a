"""Policies are static, hashable, and typed as strings."""

import pytest

from kvjax.errors import UserError
from kvjax.policy import Policy, parse_policy


def test_strings_and_policies_are_taken():
    assert parse_policy("full") == parse_policy(" full ") == parse_policy(Policy()) == Policy("full")
    assert hash(parse_policy("full")) == hash(Policy())
    assert str(Policy()) == "full"
    assert Policy().exact_slots(123) == 123


@pytest.mark.parametrize("wrong", ["", "int9", "fulll", 3, None])
def test_others_are_refused(wrong):
    with pytest.raises(UserError, match="full"):
        parse_policy(wrong)
