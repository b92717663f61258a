"""Configs that a program writes: they load, say what was set, and replace nothing that a person wrote."""

import pytest

from configs.base import decode_config
from kvjax._program import _load_config
from kvjax.config_file import check_config_target, config_text
from kvjax.errors import UserError

LONG = "+".join(["snapkv(budget=0.125)", "key(turboquant,bits=4)", "value(turboquant,bits=3)", "edges(1)", "int8" * 20])


def test_a_written_config_loads_as_what_was_set(tmp_path):
    path = tmp_path / "found.py"
    config = decode_config('a "model"')
    config.policy, config.chat, config.prompt = LONG, True, 'Say "hi"\n\\ and """.'
    config.sampling.temperature = 0.5
    config.template.enable_thinking = False
    text = config_text(config, path=path, notes=["By", '    python -m kvjax.tune --prompt=\'"""\\n\''])
    path.write_text(text)
    assert _load_config(path).to_dict() == config.to_dict()
    assert max(map(len, text.splitlines())) <= 120
    assert "config.batch" not in text
    check_config_target(path)


def test_files_of_others_are_not_replaced(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\n')
    with pytest.raises(UserError, match=r"mine\.py is there and was not written by kvjax\.tune"):
        check_config_target(path)
    with pytest.raises(UserError, match=r"give a Python file, e\.g\. .*found\.py"):
        check_config_target(tmp_path / "found")
    with pytest.raises(UserError, match="is a folder"):
        check_config_target(tmp_path)
