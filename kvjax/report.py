"""The record of a run: one JSON object with the same keys whatever the program, written atomically."""

import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from kvjax._kernels import implementations
from kvjax.errors import UserError
from kvjax.folder import ROOT


def new_report(
    program: str, *, config: dict[str, Any], policy: str = "full", mesh: Mesh | None = None
) -> dict[str, Any]:
    """The keys that every report has: program, commit, date, device, versions, config, policy, implementations.

    Args:
      program: e.g. "kvjax.decode".
      config: the run's config as a plain dict.
      policy: the policy's string.
      mesh: that the run is on; None for the device that JAX runs on.
    """
    devices = jax.devices()
    return {
        "program": program,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"kind": devices[0].device_kind, "platform": devices[0].platform, "count": len(devices)},
        "versions": {name: _version(name) for name in ("jax", "jaxlib", "flax", "numpy", "tokenizers")}
        | {"python": sys.version.split()[0]},
        "config": config,
        "policy": policy,
        "implementations": implementations(mesh),
    }


def commit() -> str | None:
    """The commit of the checkout, "-dirty" after it if files differ; None outside a checkout."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(described, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_json(path: str | Path, record: Any) -> None:
    """Writes JSON beside the target first and renames it, so that a reader never sees half a file."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically, its folder made where it is missing."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def check_target(path: str | Path) -> None:
    """Raises `UserError` if a file cannot be written there, before hours of work find out."""
    target = Path(path).absolute()
    folder = next(parent for parent in target.parents if parent.exists())
    if target.is_dir():
        raise UserError(f"{target} is a folder; give the path of a file.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{target} cannot be written: {folder} is not a folder that can be written to.")
