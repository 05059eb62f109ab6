"""A run's files on this host's disk, on their way to an object store and back."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pyarrow as pa

from cluster.deliveries import scratch
from cluster.object_store import ObjectStore
from cluster.storage import TEMPORARY, Disk

_DATABASES = (".sqlite", ".db")
_PARTS = (".new", ".part", "-wal", "-shm", "-journal")
"""Endings of what is half a file, or belongs to a database."""


class PassingDisk(Disk):
    """Changes a directory of which nothing has to outlive the process: nothing is synced."""

    def write(self, path: str, content: bytes | pa.Buffer, *, is_added: bool = False) -> None:
        """Write a file, or add to its end."""
        with open(path, "ab" if is_added else "wb") as file:
            file.write(content)

    def sync(self, path: str) -> None:
        """Do nothing."""


class Staging:
    """Knows which files of a directory are in the store as they are here.

    Args:
        directory: its files have the keys that their relative paths are.
        store: where they belong.
        say: told of a file that cannot go there.
    """

    def __init__(self, directory: str, store: ObjectStore, *, say: Callable[[str], None]) -> None:
        self._directory = directory
        self._store = store
        self._say = say
        self._brought: dict[str, Any] = {}  # key -> what its file was when it was brought up, or came from there

    def fetch(self, key: str) -> None:
        """Get a file down, if it is not here and the store has it."""
        path = os.path.join(self._directory, key)
        if not os.path.lexists(path) and self._store.exists(key):
            self._store.fetch(key, f"{path}.part")
            os.rename(f"{path}.part", path)
            self.is_brought(key)

    def is_brought(self, key: str) -> None:
        """Take note that the store has a file as it is here."""
        self._brought[key] = _look(os.path.join(self._directory, key))

    def bring(self) -> None:
        """Bring up every file that has changed since it was.

        Raises:
            OSError: when the store does not take one.
        """
        for key in self._keys():
            seen = _look(os.path.join(self._directory, key))
            if seen != self._brought.get(key):
                self._bring(key)
                self._brought[key] = seen

    def _bring(self, key: str) -> None:
        path = os.path.join(self._directory, key)
        if not key.endswith(_DATABASES):
            self._store.upload(path, key)
            return
        with scratch("database") as directory:  # a copy as of one moment, however it is written to meanwhile
            copy = os.path.join(directory, "copy")
            try:
                with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
            except sqlite3.Error as error:
                self._say(f"{key} cannot be copied and is not brought up: {error}")
                return
            self._store.upload(copy, key)

    def _keys(self) -> Iterator[str]:
        """Yield the files that belong to the store: no half ones, no links, nothing of a database but itself."""
        for root, directories, names in os.walk(self._directory):
            directories[:] = [name for name in directories if not TEMPORARY.fullmatch(name)]
            for name in sorted(names):
                path = os.path.join(root, name)
                is_whole = not (name.endswith(_PARTS) or TEMPORARY.fullmatch(name))
                if is_whole and os.path.isfile(path) and not os.path.islink(path):
                    yield os.path.relpath(path, self._directory)


def _look(path: str) -> Any:
    """Return what changes when a file does, or the log of a database."""
    found = []
    for name in (path, f"{path}-wal"):
        with suppress(FileNotFoundError):
            status = os.stat(name)
            found.append((status.st_mtime_ns, status.st_size))
    return tuple(found)
