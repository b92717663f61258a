"""Tensors in torch's zip archives (`.pt`), read without torch and without running anything that the file says.

A `.pt` file holds a pickle, and a pickle may name any function to be called. Here a name is looked up in a short table
of harmless ones, all of them this module's own or plain containers; any other name ends the reading, and nothing that
the file names has been run.

    archive/data.pkl      the object; tensors as (storage, offset, sizes, strides)
    archive/data/0 ...    the storages' bytes, little-endian
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kvjax.errors import UserError

_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "BoolStorage": "bool",
}


class _Storage(NamedTuple):
    """A storage's dtype, by its name in torch."""

    dtype: str


class _Dict(dict):
    """What stands for OrderedDict; attributes that a file would set on it are left out."""

    __slots__ = ()

    def __setstate__(self, state: Any):
        """Sets nothing."""


class _Rebuild:
    """`_rebuild` as an object on which a file cannot set attributes, as it could on a function."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> np.ndarray:
        return _rebuild(*arguments)


def _rebuild(storage: np.ndarray, offset: int, sizes: tuple, strides: tuple, *rest: Any) -> np.ndarray:
    """A tensor of a storage; what may follow (gradients, hooks) does not count."""
    del rest
    numbers = (offset, *sizes, *strides)
    if not isinstance(storage, np.ndarray) or any(not isinstance(number, int) or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor's sizes are no whole numbers")
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 in sizes:
        return np.zeros(sizes, storage.dtype)
    if last >= storage.size or math.prod(sizes) > storage.size:  # a stride of 0 may blow a few bytes up to terabytes
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    view = np.lib.stride_tricks.as_strided(
        storage[offset:], sizes, [stride * storage.itemsize for stride in strides], writeable=False
    )
    return view.copy()


class _Reader(pickle.Unpickler):
    """Knows tensors and plain containers, and nothing else."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, folder: str):
        super().__init__(io.BytesIO(data))
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Any:
        """The harmless object of that name; any other name is refused."""
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not read")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage's numbers."""
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("it refers to something that is no storage")
        data = self._archive.read(f"{self._folder}/data/{key}")
        numbers = np.frombuffer(data, jnp.dtype(storage.dtype))
        if not isinstance(count, int) or not 0 <= count <= numbers.size:
            raise pickle.UnpicklingError(f"storage {key} is shorter than it says")
        return numbers[:count]


def read_torch(path: str | Path) -> Any:
    """Reads what `torch.save` wrote: containers, numbers, strings and tensors, these as numpy arrays.

    Raises:
      UserError: the file is no such archive, is cut short, or names anything but tensors and containers. Nothing that
        it names is ever called.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise pickle.UnpicklingError("it holds no data.pkl")
            folder = pickles[0].rsplit("/", 1)[0]
            _check(archive, folder)
            return _Reader(archive.read(pickles[0]), archive, folder).load()
    except Exception as error:  # a file made to break a reader finds more kinds than one would list
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read as tensors ({reason}); nothing in it was run. Expected is a file that torch.save "
            "wrote, with plain tensors in it."
        ) from error


def _check(archive: zipfile.ZipFile, folder: str) -> None:
    """Refuses what torch does not write: compressed entries, which may be bombs; and the other byte order."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise pickle.UnpicklingError("it is compressed")
    order = f"{folder}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise pickle.UnpicklingError("its numbers are not little-endian")
