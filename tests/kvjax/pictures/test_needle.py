"""Heat maps of needles: which rows belong together, and which field an example falls into."""

import numpy as np
import pytest

from kvjax.pictures.needle import columns_for, grid_of, ink_on, kinds_of, length_of
from tests.kvjax.pictures.made_up import needle_rows, row

FACTS = {"depth": [0.0, 0.19, 0.2, 0.99, 1.0], "tokens": [250, 250, 251, 252, 260]}


def test_kinds_need_two_lengths_and_know_depths():
    rows = [
        *needle_rows(),
        row("passkey(tokens=256)", "full", facts={"depth": [0.5, 0.5], "tokens": [256, 256]}),
        row("hops(tokens=256)", "full", facts={"hops": [2, 2]}),
        row("needle(facts=8,tokens=256)", "full", facts={"depth": [0.5, 0.5], "tokens": [256, 256]}),
        row("needle(facts=8,depth=0.5)", "full", facts={"depth": [0.5, 0.5], "tokens": [512, 512]}),
        row("needle", "full", question="after", facts={"depth": [0.5, 0.5], "tokens": [512, 512]}),
        row("needle(tokens=999)", "full"),
    ]
    found = kinds_of(rows)
    assert {key: len(group) for key, group in found.items()} == {
        ("needle", "inside"): 8,
        ("needle(facts=8)", "inside"): 2,
    }


def test_lengths_are_what_was_asked_for_or_the_average():
    assert length_of(row("niah(depth=0.5, tokens=256)", "full", facts=FACTS)) == 256
    assert length_of(row("niah", "full", facts=FACTS)) == 251


def test_examples_fall_into_their_fields():
    rows = [
        row("niah(tokens=256)", "int4", scores=(1.0, 0.0, 1.0, 0.5, 1.0), facts=FACTS),
        row("niah(tokens=512)", "int4", scores=(1.0,), facts={"depth": [0.5], "tokens": [512]}),
    ]
    mean, count = grid_of(rows, [256, 512])
    np.testing.assert_array_equal(count, [[2, 0], [1, 0], [0, 1], [0, 0], [2, 0]])
    np.testing.assert_array_equal(mean, [[0.5, -1], [1, -1], [-1, 1], [-1, -1], [0.75, -1]])


@pytest.mark.parametrize(("lengths", "policies", "columns"), [(3, 10, 4), (3, 2, 2), (8, 10, 2), (40, 10, 1)])
def test_columns_leave_room_for_numbers(lengths, policies, columns):
    assert columns_for(lengths, policies) == columns


def test_ink_stands_out():
    assert ink_on((1.0, 1.0, 1.0, 1.0)) == "#111417"
    assert ink_on((0.0, 0.0, 0.3, 1.0)) == "#ffffff"
