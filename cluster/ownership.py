"""Who may write below a URL: one process at a time, though an object store has no locks.

The owner writes an object that nobody else has written like that, again every `BEAT_S`.  A newcomer that finds one
watches it: where it changes, its owner is alive, and the newcomer is refused; where it has not for `SILENCE_S`, its
owner is taken for dead, and the newcomer's takes its place.  Only the newcomer's own clock measures that, so machines
need not agree on the time.  An example: a process is killed, and the next one waits a minute for it and takes over.

An owner that was only silent, on a machine that stood still, finds another's object when it looks: it must look before
each change (`check`), and then changes nothing any more.  Between the look and the change remains a gap of a round trip
that only a store's own conditional writes would close.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.lock import TakenError
from cluster.object_store import ObjectStore
from cluster.storage import StorageError

KEY = "owner.json"
BEAT_S = 10.0
SILENCE_S = 60.0
_LOOK_S = 2.0
_SETTLE_S = 1.0
"""Two newcomers at the same moment: the one whose object is still there after so long has won."""


class LostError(StorageError):
    """Another process has become the owner meanwhile; the message says what that means."""


class Ownership:
    """The right to change what lies below a URL, from the making of this to `release`.

    Args:
        store: of the URL.
        say: told of a wait.
        clock: seconds; only differences count.
        sleep: waits, seconds.
        beats: whether a thread keeps it up; without one, the caller calls `beat`.

    Raises:
        TakenError: while another process has it.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        beats: bool = True,
    ) -> None:
        self._store = store
        self._token = secrets.token_hex(8)
        self._number = 0
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        _wait_for_silence(store, say, clock, sleep)
        self._write()
        sleep(_SETTLE_S)
        found = _read(store)
        if found is None or found["token"] != self._token:
            raise TakenError(_name(found or {}))
        if beats:
            threading.Thread(target=self._keep_up, name="run-owner", daemon=True).start()

    def check(self) -> None:
        """Return where this process is still the owner.

        Raises:
            LostError: where it is not.
            OSError: where the store does not say.
        """
        found = _read(self._store)
        if found is None or found["token"] != self._token:
            by = f"process {_name(found)} has taken it over" if found else f"{KEY} was deleted"
            raise LostError(
                f"{self._store.shown()} must belong to one process, and {by}, as this one was silent for more than "
                f"{SILENCE_S:g} s; it writes nothing more there; end one of the two, and continue the other's run"
            )

    def beat(self) -> None:
        """Say that the owner is alive, if it is still the owner."""
        with self._lock:
            if not self._is_over.is_set():
                self.check()
                self._write()

    def release(self) -> None:
        """Give it up, so that the next process need not wait; what the store refuses leaves it to the silence."""
        self._is_over.set()
        with self._lock:
            try:
                self.check()
                self._store.delete(KEY)
            except (LostError, OSError):
                pass

    def _keep_up(self) -> None:
        while not self._is_over.wait(BEAT_S):
            try:
                self.beat()
            except LostError:
                return  # the next change says so
            except OSError:
                continue

    def _write(self) -> None:
        self._number += 1
        owner = {
            "token": self._token,
            "beat": self._number,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "time": time.time(),
        }
        self._store.write(KEY, json.dumps(owner).encode())


def owner(store: ObjectStore, *, now: float) -> str | None:
    """Return the owner as people name it, None where there is none or it has been silent for long.

    Args:
        store: of the URL.
        now: Unix time, seconds; it is compared with the owner's, for this is only to be shown.
    """
    found = _read(store)
    return _name(found) if found is not None and now - found["time"] < SILENCE_S else None


def _wait_for_silence(
    store: ObjectStore, say: Callable[[str], None], clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    first, since = _read(store), clock()
    if first is None:
        return
    say(f"process {_name(first)} has {store.shown()}, or had; waiting up to {SILENCE_S:g} s for a sign of life")
    while clock() - since < SILENCE_S:
        sleep(_LOOK_S)
        found = _read(store)
        if found is None:
            return
        if found != first:
            raise TakenError(_name(found))


def _read(store: ObjectStore) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(store.read(KEY))
    except FileNotFoundError:
        return None
    return found


def _name(found: dict[str, Any]) -> str:
    return f"{found.get('process', '?')} on {found.get('host', '?')}"
