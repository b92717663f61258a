"""Checkpoint folders and JSON files (hub names: tests/models/test_load.py)."""

import pytest

from kvjax.errors import UserError
from kvjax.folder import ROOT, find_checkpoint, read_json


def test_folders_are_found_from_here_and_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("mine").resolve() == tmp_path / "mine"
    assert find_checkpoint("models/families") == ROOT / "models" / "families"
    with pytest.raises(UserError, match="There is no checkpoint folder 'not here'"):
        find_checkpoint("not here")


def test_json(tmp_path):
    path = tmp_path / "a.json"
    assert read_json(path, default={"b": 1}) == {"b": 1}
    with pytest.raises(UserError, match="There is no"):
        read_json(path)
    for text, message in (("{", "is not JSON"), ("3", "holds a int"), (b"\xff\xfe", "is not JSON")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=message):
            read_json(path)
