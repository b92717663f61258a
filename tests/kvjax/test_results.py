"""Tables: intervals against their formulas, notes on cells that say nothing, and how it all reads."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from kvjax.results import TASK_COLUMNS, TEXT_COLUMNS, interval, mark, markdown_tables, tables, terminal_tables

EXACT = "+exact(sinks=2,window=8,round=8)"
FRAME = f"(budget=64){EXACT}"
ASKED = f"snapkv(budget=64,queries=16)+int4{EXACT}"


def wilson(right, count):
    """E. B. Wilson's interval of a share, 1927."""
    z, share = 1.959963984540054, right / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return centre - half, centre + half


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 10), (7, 10), (95, 100), (200, 200), (1, 3)])
def test_shares_have_wilsons_interval(right, count):
    found = interval([1.0] * right + [0.0] * (count - right))
    assert found == pytest.approx(wilson(right, count), abs=1e-9)
    assert 0 <= found[0] <= right / count <= found[1] <= 1


def test_fractions_have_students():
    """Mean 0.5, standard deviation sqrt(1/15), 2.776 for four degrees of freedom."""
    scores = [0.25, 0.75, 0.5, 0.25, 0.75]
    half = 2.7764451 * np.std(scores, ddof=1) / math.sqrt(5)
    assert interval(scores) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)


def test_no_interval_leaves_what_is_possible():
    assert interval([0.5, 1.0])[1] == 1.0
    assert interval([0.5, 0.0])[0] == 0.0
    assert interval([0.5]) == (0.0, 1.0)
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def row(policy, accuracy=None, *, task="needle(tokens=90)", question="inside", **more):
    """A row as evaluations give it; of a text where there is no accuracy."""
    numbers = {
        "task": task,
        "question": question,
        "policy": policy,
        "examples": 20,
        "max_tokens": 128,
        "key_bits": 4.5,
        "value_bits": 8.25,
        "ratio_to_dtype": 5.678,
        "perplexity": 7.65432,
        "perplexity_change": 0.0123456,
        "kl_mean": 0.01234567,
        "kl_p999": 1.23456,
        "top1_agreement": 0.98761,
    }
    if accuracy is not None:
        low, high = max(accuracy - 0.05, 0), min(accuracy + 0.05, 1)
        numbers |= {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "agreement": 0.5}
    return numbers | more


def rows_of(full, oracle, **more):
    accuracies = {"full": full, f"random{FRAME}": 0.25, f"streaming{FRAME}": 0.1, f"oracle{FRAME}": oracle, ASKED: 0.5}
    return [row(policy, accuracy, **more) for policy, accuracy in accuracies.items()]


def notes(rows):
    return [one["note"] for one in mark(rows)]


def test_where_full_fails_no_row_says_anything():
    assert notes(rows_of(0.9, 0.8)) == ["full below 0.95: says nothing", *["full 0.900: says nothing"] * 4]
    assert notes(rows_of(0.949, 1.0))[1] == "full 0.949: says nothing"
    assert all(notes(rows_of(0.9499, 1.0)))


def test_where_the_oracle_fails_no_row_at_its_budget_says_anything():
    assert notes(rows_of(1.0, 0.89)) == ["", *["oracle 0.890: says nothing"] * 4]
    other = row(f"h2o(budget=32){EXACT}", 0.5)
    assert notes([*rows_of(1.0, 0.89), other])[-1] == ""
    assert notes([*rows_of(1.0, 0.89), row("int4", 0.5)])[-1] == ""


def test_where_chance_does_as_well_no_row_at_its_budget_says_anything():
    rows = [row(f"random{FRAME}", 0.97) if one["policy"].startswith("random") else one for one in rows_of(1.0, 1.0)]
    assert notes(rows) == ["", *["random 0.970: says nothing"] * 4]
    assert notes([*rows, row("int4", 0.5), row(f"h2o(budget=32){EXACT}", 0.5)])[-2:] == ["", ""]


@pytest.mark.parametrize(("full", "oracle"), [(1.0, 0.9), (0.95, 0.86), (0.96, 1.0)])
def test_where_both_do_well_there_is_nothing_to_note(full, oracle):
    assert notes(rows_of(full, oracle)) == [""] * 5


def test_notes_are_of_a_task_and_a_place_of_the_question():
    easy, hard = rows_of(1.0, 1.0), rows_of(1.0, 0.2, question="after")
    other = rows_of(0.5, 0.5, task="dfs")
    found = notes([*easy, *hard, *other])
    assert found[:5] == [""] * 5
    assert found[5:10] == ["", *["oracle 0.200: says nothing"] * 4]
    assert found[10].startswith("full below 0.95")


def test_texts_and_runs_without_full_have_no_notes():
    assert notes([row("full"), row(ASKED)]) == ["", ""]
    assert notes([row(ASKED, 0.1)]) == [""]
    rows = [row("full")]
    mark(rows)
    assert "note" not in rows[0]  # the rows that came stay as they are


def test_tables_are_one_a_task_and_place_in_the_order_of_the_rows():
    rows = [*rows_of(1.0, 1.0), row("full", task="ppl"), *rows_of(0.9, 0.8, question="after"), row(ASKED, task="ppl")]
    first, *found = tables(rows)
    assert first[0].startswith("Accuracy, 20 examples; in brackets where")
    assert [title for title, _, _ in found] == [
        "needle(tokens=90), question inside: 20 examples, 128 tokens of room",
        "ppl: 20 examples, 128 tokens of room",
        "needle(tokens=90), question after: 20 examples, 128 tokens of room",
    ]
    assert [columns for _, columns, _ in found] == [list(TASK_COLUMNS), list(TEXT_COLUMNS), list(TASK_COLUMNS)]
    assert [len(cells) for _, _, cells in found] == [5, 2, 5]


def test_several_tasks_are_summed_up_first():
    hard = rows_of(0.9, 0.8, task="dfs", question="after", ratio_to_dtype=3.21)
    more = row(ASKED, 0.75, task="hops")
    _, columns, cells = tables([*rows_of(1.0, 0.95), *hard, more])[0]
    assert columns == ["policy", "times smaller", "needle(tokens=90)", "dfs, after", "hops"]
    assert cells[0] == ["full", "3.2 to 5.7", "100.0%", "(90.0%)", "-"]
    assert cells[1] == [f"random{FRAME}", "3.2 to 5.7", "25.0%", "(25.0%)", "-"]
    assert cells[-1] == [ASKED, "3.2 to 5.7", "50.0%", "(50.0%)", "75.0%"]
    assert len(cells) == 5
    assert tables([row("full", 1.0), row("full", task="ppl")])[0][1] == list(TASK_COLUMNS)  # one cell is no summary


def test_numbers_are_rounded_for_people():
    task = tables([row("full", 0.95, tokens_per_second=12345.6)])[0][2]
    assert task == [["full", "5.68", "95.0%", "90.0% to 100.0%", "50.0%", "0.01235", "12,346", ""]]
    (text,) = tables([row("int8", task="ppl")])[0][2]
    assert text == ["int8", "4.500", "8.250", "5.68", "7.6543", "+1.235%", "0.01235", "1.235", "98.76%", "-"]


def test_markdown_has_a_heading_and_a_table_each():
    text = markdown_tables([row("full", 1.0), row(ASKED, 0.5), row("full", task="ppl")])
    lines = text.splitlines()
    assert lines[0] == "### needle(tokens=90), question inside: 20 examples, 128 tokens of room"
    assert lines[1] == ""
    assert lines[2].startswith("| policy | times smaller | accuracy | 95 % interval |")
    assert lines[3] == "|" + " --- |" * len(TASK_COLUMNS)
    assert lines[4].startswith("| `full` | 5.68 | 100.0% | 95.0% to 100.0% |")
    assert lines[5].startswith(f"| `{ASKED}` |")
    assert lines[6] == ""
    assert lines[7].startswith("### ppl: ")
    assert {line.count("|") for line in lines[2:6]} == {len(TASK_COLUMNS) + 1}
    assert text.endswith("|\n")


def test_a_terminal_shows_the_same():
    rows = [*rows_of(1.0, 0.5), row("full", task="ppl")]
    console = Console(width=200, record=True, file=io.StringIO())
    found = terminal_tables(rows)
    for table in found:
        console.print(table)
    shown = console.export_text()
    assert len(found) == 2
    for title, columns, cells in tables(rows):
        assert title in shown
        assert all(word in shown for line in [columns, *cells] for word in line)
