"""Names to values, found by listing a package: a new entry is a new file and edits nothing else."""

import importlib
import pkgutil
from typing import Generic, TypeVar

from kvjax.errors import unknown

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """A table of named entries that refuses duplicates and, on an unknown name, lists the known ones.

    Args:
      kind: what an entry is, for messages ("model type").
      package: the package whose modules register themselves; its modules without a leading underscore are
        imported the first time that a name is looked up.
    """

    def __init__(self, kind: str, *, package: str):
        self._kind = kind
        self._package = package
        self._entries: dict[str, Entry] = {}
        self._listed = False

    def register(self, name: str, entry: Entry) -> Entry:
        """Adds an entry; raises `ValueError` if the name is taken."""
        if name in self._entries:
            raise ValueError(f"The {self._kind} '{name}' is registered twice: {self._entries[name]!r} and {entry!r}.")
        self._entries[name] = entry
        return entry

    def names(self) -> tuple[str, ...]:
        """The names of all entries, sorted."""
        self._list_package()
        return tuple(sorted(self._entries))

    def get(self, name: str) -> Entry:
        """The entry of that name; raises `UserError` with the known names if there is none."""
        self._list_package()
        if name not in self._entries:
            raise unknown(self._kind, name, self._entries)
        return self._entries[name]

    def _list_package(self) -> None:
        if self._listed:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        self._listed = True
