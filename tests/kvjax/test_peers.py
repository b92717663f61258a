"""Other libraries run in processes of their own, and say what they lack."""

import sys

import pytest

from kvjax.errors import UserError
from kvjax.peers import Case, Transformers, parse_case


def test_cases_are_batch_times_context():
    assert parse_case("8x1024") == Case(8, 1024)
    for wrong in ("8", "8x", "x8", "0x4", "ax4", "8x0"):
        with pytest.raises(UserError, match="is not BATCHxCONTEXT"):
            parse_case(wrong)


def test_a_python_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="There is no Python"):
        Transformers(str(tmp_path / "python"), tmp_path)


def test_a_python_without_the_peer_says_what_it_lacks(tmp_path):
    peer = Transformers(sys.executable, tmp_path)
    assert peer.missing == "torch"
    peer.close()
