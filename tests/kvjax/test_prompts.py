"""Prompt files (malformed lines and resumption: test_decode.py)."""

import pytest

from kvjax.errors import UserError
from kvjax.prompts import Prompt, ResultFile, read_prompts


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a", "id": 4}\n\n{"messages": [{"role": "user", "content": "b"}], "seed": 1}\n')
    assert list(read_prompts(path)) == [
        Prompt(line=1, text="a", id=4),
        Prompt(line=3, messages=({"role": "user", "content": "b"},), seed=1),
    ]


def test_good_lines_come_before_the_error(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + b"\xff" * 10)
    prompts = read_prompts(path)
    with pytest.raises(UserError, match="line 2 is not JSON in UTF-8"):
        list(prompts)


def test_results_survive_and_count(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    ResultFile(path, settings={"a": 1}).write(Prompt(line=3, id="x"), text="t")
    again = ResultFile(path, settings={"a": 1})
    assert again.is_finished(Prompt(line=3, id="y"))
    assert not again.is_finished(Prompt(line=4))
    with pytest.raises(UserError, match="another prompt of line 3"):
        again.is_finished(Prompt(line=3, text="new"))
    with pytest.raises(UserError, match=r"results of other settings \(a\)"):
        ResultFile(path, settings={"a": 2})
