"""Files and folders that are named relative to here or to the project's root, and checkpoints by hub name."""

import json
import re
from pathlib import Path
from typing import Any

from kvjax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds `configs/` and `models/`: the checkout, or where the packages were installed."""

_SMALL_FILES = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_COPIES = ["consolidated*", "original/*"]  # the same weights again, in their makers' own layouts


def _places(name: str | Path) -> tuple[Path, Path]:
    """Where a path may lie: as it is given, and below the project's root."""
    given = Path(name).expanduser()
    return given, ROOT / given


def find_file(name: str, kind: str, *, advice: str = "Check the path.") -> Path:
    """The path of a file or folder named relative to here or to the project's root.

    Args:
      name: the path.
      kind: what it is, for the message.
      advice: the way out, for the message.

    Raises:
      UserError: there is no such file.
    """
    for path in _places(name):
        if path.exists():
            return path
    raise UserError(f"There is no {kind} '{name}', neither here nor in {ROOT}. {advice}")


def find_checkpoint(name: str | Path, *, weights: bool = True) -> Path:
    """The folder of a checkpoint.

    Args:
      name: a folder, relative to here or to the project's root, or a hub name such as "Qwen/Qwen3-8B", which is
        downloaded through huggingface_hub where that is installed.
      weights: whether a download should bring the weights.

    Raises:
      UserError: there is no such folder, and the name cannot be downloaded.
    """
    for path in _places(name):
        if path.is_dir():
            return path
        if path.is_file():
            raise UserError(f"{path} is a file; give the folder that holds config.json and the weights.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise UserError(f"There is no checkpoint folder '{name}'; give a folder or a hub name such as Qwen/Qwen3-8B.")
    return _download(str(name), _SMALL_FILES + _WEIGHTS * weights)


def _download(name: str, patterns: list[str]) -> Path:
    """Downloads a checkpoint, or finds it in the hub's local cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"There is no folder '{name}', and downloading it needs huggingface_hub: pip install 'kvjax[hub]'."
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=_COPIES))
    except Exception as error:  # the library's errors share no base: network, permission, unknown name
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"There is no folder '{name}', and downloading it failed: {first_line} Check the name, the network and "
            "your access, or give a local folder."
        ) from error


def read_json(path: Path, *, default: Any = None) -> Any:
    """Reads a JSON object.

    Args:
      path: the file.
      default: what a missing file gives; None makes it an error.

    Raises:
      UserError: the file is missing without a default, or is not a JSON object.
    """
    if not path.exists():
        if default is None:
            raise UserError(f"There is no {path}.")
        return default
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a JSON object was expected.")
    return content
