"""Progress stays silent without a terminal."""

from kvjax.progress import Progress


def test_nothing_is_printed_without_a_terminal(capsys):
    with Progress("testing", unit="things", total=2) as progress:
        progress.advance(1)
        progress.advance(1)
    assert capsys.readouterr() == ("", "")
