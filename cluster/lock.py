"""A lock on a file, which is free as soon as the process that has it ends, however it ends."""

import fcntl
import os
import time
from contextlib import suppress
from typing import Protocol

_NUM_TRIES = 5
_RETRY_S = 0.05


class TakenError(RuntimeError):
    """Another process has the lock; the message names it."""


class Lock(Protocol):
    """A right that one process has until it closes this."""

    def close(self) -> None:
        """Give it up."""


class FileLock:
    """The lock on a file, which holds its owner's process id.

    Raises:
        TakenError: when another process has it.
    """

    def __init__(self, path: str) -> None:
        self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            self._take()
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            raise TakenError(owner) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def close(self) -> None:
        """Give it up."""
        self._file.close()

    def _take(self) -> None:
        """Lock the file at once, or after a moment: somebody who asks for the holder has it for as long as it takes."""
        for _ in range(_NUM_TRIES - 1):
            with suppress(BlockingIOError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(_RETRY_S)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_holder(path: str) -> str | None:
    """Return the id of the process that has the lock on a file; None where nobody has."""
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None
