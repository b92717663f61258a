"""Lines of a program's own between texts, bars, and texts without their middle."""

import pytest

from kvjax.screen import note, shorten, show_beside, sparkline


def test_without_a_terminal_texts_are_printed_as_they_are(capsys):
    note("full", style="bold")
    show_beside("a [red]b\tc\n[/red] d" + "e" * 300, "a [red]b\td")
    assert capsys.readouterr().out == "--- full\na [red]b\tc\n[/red] d" + "e" * 300 + "\n"


def test_on_a_terminal_what_differs_has_another_colour(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_beside("abcd", "abxy")
    out = capsys.readouterr().out
    assert "ab" in out
    assert "abcd" not in out
    assert "\x1b[" in out


@pytest.mark.parametrize(
    ("numbers", "bars"),
    [
        ([], ""),
        ([0.0, 0.0], "▁▁"),
        ([-1e-9, 0.0], "▁▁"),
        ([1.0], "█"),
        ([0.0, 0.3, 0.5, 0.9, 1.0], "▁▃▅██"),
    ],
)
def test_bars(numbers, bars):
    assert sparkline(numbers) == bars


def test_many_numbers_are_shown_by_the_largest_of_neighbours():
    numbers = [0.0] * 1000
    numbers[501] = 2.0
    assert sparkline(numbers, width=10) == "▁▁▁▁▁█▁▁▁▁"
    assert len(sparkline(numbers[:61], width=60)) == 60


def test_long_texts_lose_their_middle():
    assert shorten("abc", most=3) == "abc"
    assert shorten("a" * 50 + "b" * 50, most=27) == "a" * 10 + " [...] " + "b" * 10
