"""Reads tensors, or parts of them, from a folder of safetensors files, one or many with an index.

Nothing but the part that is asked for is read into memory; files are mapped. All faults of files are found before
the first tensor is read, and named.
"""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from kvjax.errors import UserError
from kvjax.folder import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")


class SafetensorsFolder:
    """The tensors of a folder by name.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Raises:
      UserError: a file is missing, truncated, malformed, or lacks a tensor that the index puts there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file_of, self._shape_of = _read_headers(folder)

    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `UserError` unless a tensor of that name and shape, in a float dtype, is there."""
        if name not in self._file_of:
            raise UserError(f"{self._folder} lacks the tensor '{name}' of shape {shape}, which config.json asks for.")
        found, dtype = self._shape_of[name]
        if dtype not in _DTYPES:
            hint = " Quantised checkpoints are not supported; use a bf16 one." if dtype.startswith("F8") else ""
            raise UserError(f"The tensor '{name}' has dtype {dtype}; expected one of {', '.join(_DTYPES)}.{hint}")
        if found != shape:
            raise UserError(
                f"The tensor '{name}' in {self._file_of[name].name} has shape {found}; config.json asks for {shape}."
            )

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""
        # Opened for each part: what was read of a mapped file would stay in this process's memory while it is open.
        with safe_open(self._file_of[name], framework="numpy") as file:
            return file.get_slice(name)[slices]


def _read_headers(folder: Path) -> tuple[dict[str, Path], dict[str, tuple[tuple[int, ...], str]]]:
    """The file, shape and dtype of each tensor."""
    single, index = folder / _SINGLE, folder / _INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map from names of tensors to names of files.")
        missing = sorted({name for name in weight_map.values() if not (folder / name).exists()})
        if missing:
            raise UserError(f"{index} names {len(missing)} file(s) that are not there: {', '.join(missing[:3])}.")
    elif single.exists():
        weight_map = None
    else:
        raise UserError(f"{folder} holds neither {_SINGLE} nor {_INDEX}: no weights to load.")
    file_of, shape_of = {}, {}
    for path in [single] if weight_map is None else [folder / name for name in sorted(set(weight_map.values()))]:
        for name, shape_and_dtype in _read_header(path).items():
            file_of[name], shape_of[name] = path, shape_and_dtype
    for name, file in (weight_map or {}).items():
        if file_of.get(name) != folder / file:
            raise UserError(f"{index} puts the tensor '{name}' into {file}, which does not hold it.")
    return file_of, shape_of


def _read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of one file; finds out whether the file is whole."""
    try:
        with safe_open(path, framework="numpy"):  # the library's own checks: offsets, overlaps, length
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); download it again.") from error
    return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items() if name != "__metadata__"}
