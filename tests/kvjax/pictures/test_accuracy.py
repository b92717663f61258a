"""The picture of accuracy against bytes: points, front, places and titles, by hand."""

import pytest

from kvjax.pictures.accuracy import (
    Point,
    bands,
    front,
    halvings,
    heading,
    log_ticks,
    places_of,
    points_of,
    side_by_side,
)
from tests.kvjax.pictures.made_up import POLICIES, likelihood_row, row


def point(policy, share, value, note=""):
    return Point(policy, share, value, value, value, note)


def test_points_are_shares_of_the_uncompressed_cache():
    rows = [row("hops", "full", scores=(1.0, 1.0)), row("hops", POLICIES[1], size=50, note="oracle 0.50: says nothing")]
    assert points_of(rows) == [
        Point("full", 1.0, 1.0, 0.9, 1.0),
        Point(POLICIES[1], 0.125, 0.5, 0.4, 0.6, "oracle 0.50: says nothing"),
    ]


def test_likelihood_has_no_point_for_full():
    rows = [likelihood_row("full", 0.0), likelihood_row("int4", 0.25), likelihood_row("int8", 1e-9)]
    assert [(one.policy, one.value, one.low) for one in points_of(rows)] == [("int4", 0.25, 0.25), ("int8", 1e-6, 1e-6)]


def test_the_front_is_what_no_other_beats():
    points = [
        point("a", 0.1, 0.5),
        point("b", 0.1, 0.4),  # same bytes, worse
        point("c", 0.2, 0.5),  # more bytes, no better
        point("d", 0.3, 0.7),
        point("e", 0.15, 0.9, note="says nothing"),
        point("oracle(budget=64)", 0.05, 1.0),
        point("full", 1.0, 0.9),
    ]
    assert [one.policy for one in front(points)] == ["a", "d", "full"]
    assert [one.policy for one in front(points, higher=False)] == ["b"]
    assert front([]) == []


def test_side_by_side_moves_as_little_as_can_be():
    assert side_by_side([0.0, 5.0], 1.0) == [0.0, 5.0]
    assert side_by_side([2.0, 2.0, 2.0], 1.0) == pytest.approx([1.0, 2.0, 3.0])
    assert side_by_side([3.0, 0.0, 3.2], 1.0) == pytest.approx([2.6, 0.0, 3.6])
    assert side_by_side([], 1.0) == []


def test_bands_are_what_overlaps_directly_or_through_others():
    assert bands([(0.0, 0.2), (0.5, 0.7), (0.1, 0.4), (0.35, 0.45)]) == [[0, 2, 3], [1]]
    assert bands([]) == []


def test_only_points_that_hide_each_other_are_moved():
    points = [point("a", 0.25, 0.1), point("b", 0.25, 0.1), point("c", 0.25, 0.9)]
    found = places_of(points, [(0.0, 0.2), (0.0, 0.2), (0.8, 1.0)], gap=2.0)
    assert found == pytest.approx({"a": 0.125, "b": 0.5, "c": 0.25})


@pytest.mark.parametrize(
    ("smallest", "most", "expected"),
    [(0.3, 8, [1, 0.5]), (0.9, 8, [1, 0.5]), (0.05, 8, [1, 0.5, 0.25, 0.125, 0.0625]), (0.03, 5, [1, 0.25, 0.0625])],
)
def test_halvings(smallest, most, expected):
    assert halvings(smallest, most) == expected


def test_log_ticks_enclose_the_values():
    assert log_ticks([0.02, 0.5]) == [0.01, 0.03, 0.1, 0.3, 1.0]
    assert log_ticks([0.3]) == [0.3]


def test_headings():
    rows = [{**row("hops", policy, question="after"), "note": ""} for policy in POLICIES]
    assert heading(rows, width=40) == ("hops", "2 examples; question after compression")
    rows[3]["note"] = "oracle 0.50: says nothing"
    assert heading(rows, width=80)[1].endswith("; grey says nothing: oracle 0.50")
    rows[0]["note"] = "full below 0.95: says nothing"
    title, remark = heading([{**one, "task": "hops(tokens=512,hops=3)"} for one in rows], width=12)
    assert remark.replace("\n", " ").endswith("; grey says nothing: full below 0.95")
    assert title == "hops(tokens…"
