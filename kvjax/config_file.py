"""Config files that a program writes, for `python -m kvjax.decode`."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs.base import decode_config
from kvjax.errors import UserError
from kvjax.report import check_target

_MARK = "written by kvjax.tune"
_WIDTH = 120


def check_config_target(path: Path) -> None:
    """Raises `UserError` unless a config can be written there and replaces none that a person wrote."""
    check_target(path)
    if path.suffix != ".py":
        raise UserError(f"{path} is no name for a config: give a Python file, e.g. {path.with_suffix('.py')}.")
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        raise UserError(f"{path} is there and was not {_MARK}; give another --output.")


def config_text(config: ConfigDict, *, path: Path, notes: list[str]) -> str:
    """The text of a config file: the settings that are not the defaults, and how they came about.

    Args:
      config: the settings, with the fields of `configs/base.py`.
      path: where the file will be.
      notes: paragraphs for its docstring.
    """
    base = _flat(decode_config(config.model).to_dict())
    changed = {name: value for name, value in _flat(config.to_dict()).items() if value != base.get(name)}
    head = [f"{config.model} under a limit of memory, {_MARK}.", f"    python -m kvjax.decode --config={path}", *notes]
    told = "\n\n".join(head).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    lines = [
        f'"""{told}\n"""',
        "",
        "from ml_collections import ConfigDict",
        "",
        "from configs.base import decode_config",
        "",
        "",
        "def get_config() -> ConfigDict:",
        '    """The settings."""',
        f"    config = decode_config({_written(config.model)})",
        *(_assignment(name, value) for name, value in changed.items()),
        "    return config",
    ]
    return "\n".join(lines) + "\n"


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _written(value: Any) -> str:
    """A value as Python text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _assignment(name: str, value: Any) -> str:
    """A line that sets a field; a long string is broken at its plus signs."""
    line = f"    config.{name} = {_written(value)}"
    if len(line) <= _WIDTH or not isinstance(value, str) or "+" not in value:
        return line
    first, *others = value.split("+")
    pieces = "\n".join(f"        {_written(piece)}" for piece in (first, *(f"+{other}" for other in others)))
    return f"    config.{name} = (\n{pieces}\n    )"
