"""The disk of a simulated world: the real run storage on a directory in memory, each of whose changes may go wrong.

Every operation that changes the disk is a place where the driver may die, before it or after it, and where the disk may
be full.  After a death nothing gets through any more, not even tidying up; a file whose content was not synced yet may
have lost its end, and a checkpoint may be damaged behind everybody's back.
"""

import errno
import os
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from cluster.checkpoints import step_of
from cluster.deliveries import delivered
from cluster.storage import Disk
from tests.simulated_world import Crash, World

_TAKE_ROOM = {"write", "sync", "mkdir", "rename"}


class SimulatedDisk(Disk):
    """One directory that outlives the drivers of a world."""

    def __init__(self, world: World, directory: str) -> None:
        self.directory = directory
        self._world = world
        self._num_safe_bytes = 0
        """Of the file that is being written."""

    def announce(self, operation: str, path: str) -> None:
        """Reach an operation: the driver dies, or the disk is full, or neither."""
        try:
            self._world.crash_if("crash_before_write")
        except Crash:
            if operation == "sync" and os.path.isfile(path):
                self._tear(path)
            raise
        if operation in _TAKE_ROOM and self._world.strikes("disk_full"):
            self._world.tell(f"disk full at {operation} {self._name(path)}")
            if operation == "sync" and os.path.isfile(path):
                self._tear(path)
            raise OSError(errno.ENOSPC, "no space left on device (simulated)", path)

    def write(self, path: str, content: bytes | pa.Buffer, *, is_added: bool = False) -> None:
        """Write a file."""
        self._num_safe_bytes = os.path.getsize(path) if is_added else 0
        self._done("write", path, lambda: super(SimulatedDisk, self).write(path, content, is_added=is_added))

    def sync(self, path: str) -> None:
        """Sync a file or a directory."""
        self._num_safe_bytes = os.path.getsize(path)  # what is not written here, ranks have synced
        self._done("", path, lambda: super(SimulatedDisk, self).sync(path))

    def rename(self, source: str, target: str) -> None:
        """Give a file or a directory another name."""
        self._done("rename", target, lambda: super(SimulatedDisk, self).rename(source, target))

    def unlink(self, path: str) -> None:
        """Delete a file."""
        self._done("unlink", path, lambda: super(SimulatedDisk, self).unlink(path))

    def write_share(self, path: str, text: str) -> None:
        """A rank writes a file."""
        directory, name = os.path.split(path)
        with delivered(directory, has_hashes=True) as local, open(os.path.join(local, name), "w") as file:
            file.write(text)

    def damage(self) -> None:
        """The newest checkpoint may lose a file, an end or a bit, as long as there is another one."""
        root = os.path.join(self.directory, "checkpoints")
        names = os.listdir(root) if os.path.isdir(root) else []
        whole = sorted(step for name in names if (step := step_of(name)) is not None)
        if len(whole) < 2 or not self._world.strikes("checkpoint_damage"):
            return
        directory, chance = os.path.join(root, f"step-{whole[-1]}"), self._world.random
        path = os.path.join(directory, chance.choice(sorted(os.listdir(directory))))
        how = chance.choice(["missing", "short", "flipped"])
        self._world.tell(f"{self._name(path)} is {how}")
        if how == "missing":
            os.unlink(path)
        elif how == "short":
            os.truncate(path, os.path.getsize(path) - 1)
        else:
            _flip(path, chance.randrange(8 * os.path.getsize(path)))

    def _done(self, operation: str, path: str, act: Callable[[], Any]) -> None:
        act()
        if operation:
            self._world.tell(f"disk {operation} {self._name(path)}")
        self._world.crash_if("crash_after_write")

    def _tear(self, path: str) -> None:
        """Lose the end of what was not synced."""
        size = self._world.random.randint(self._num_safe_bytes, max(os.path.getsize(path), self._num_safe_bytes))
        self._world.tell(f"torn {self._name(path)}")
        os.truncate(path, size)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.directory)


def _flip(path: str, bit: int) -> None:
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        content[bit // 8] ^= 1 << bit % 8
        file.seek(0)
        file.write(content)
