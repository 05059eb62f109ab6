"""A run directory in an object store; `open_storage` returns it, or the one on a file system.

The store has the truth, and this host a staging directory: files are made there as in any run directory, and brought up
before whoever made them goes on.  What is read is got down when it is first asked for.  So the next process may be on
another machine, and starts with an empty staging directory, always.

A checkpoint never passes through here.  Each rank brings its share (`deliveries.py`), this process what belongs to it,
and last the manifest, which says which attempt counts: a checkpoint without one is not there, and one that is deleted
loses it first.  The order of a step's end: its rows before the learner steps on them; journal, ledger and what else
grows before the manifest of a checkpoint, and about once a minute.

    checkpoints/step-6/manifest.json             3f2a91bc/run.json and the others, with their hashes
    checkpoints/step-6/3f2a91bc/...              the files
    checkpoints/step-6/manifest.json.damaged     in place of the manifest: the files are not what it says
    start/manifest.json, start/<attempt>/...     the model that the run began with, for every host
    owner.json                                   who writes here (`ownership.py`)
"""

import atexit
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pyarrow as pa

from actors.cache import build_once
from cluster.checkpoints import MANIFEST, name_of, parse_manifest, render_manifest, step_of
from cluster.deliveries import HASHES, OnEachHost, attempt_of, bring, fetched, scratch
from cluster.object_store import ObjectStore, is_url
from cluster.ownership import Ownership, owner
from cluster.staging import PassingDisk, Staging
from cluster.storage import CHECKPOINTS, RunStorage, StorageError

_DAMAGED = f"{MANIFEST}.damaged"
_START = "start"
_FLUSH_S = 60.0
"""Shortest time between two uploads of what grows, between checkpoints."""
_FLUSH_SHARE = 0.05
"""Largest share of the time that they may take."""


def open_storage(run_dir: str) -> RunStorage:
    """Return the storage of a run directory, which is a path or a URL."""
    return RemoteStorage(ObjectStore(run_dir)) if is_url(run_dir) else RunStorage(run_dir)


class RemoteStorage(RunStorage):
    """Reads and writes one run directory in an object store; see `RunStorage` for what the methods promise.

    Args:
        store: of the run directory's URL.
        own: makes this process the owner, see `Ownership`.
    """

    def __init__(self, store: ObjectStore, *, own: Callable[..., Ownership] = Ownership) -> None:
        self._store = store
        self._own = own
        self._owner: Ownership | None = None
        staging = ExitStack()
        super().__init__(staging.enter_context(scratch(store.url.rpartition("/")[2])), PassingDisk())
        atexit.register(staging.close)  # not with this object: paths were handed out
        self._hashes: dict[str, dict[str, str]] = {}  # directory of an attempt under way -> its files from here
        self._whole: set[str] = set()  # directories of checkpoints that were read and found whole
        self._staging = Staging(self.directory, store, say=lambda text: self._say(text))
        self._flushed = (time.monotonic(), 0.0)  # when, and how long it took
        self.num_failed_flushes = 0

    def address(self, *parts: str) -> str:
        """Return a URL."""
        return f"{self._store.url}/{self._key(*parts)}".removesuffix("/.")

    def shown(self, *parts: str) -> str:
        """Return a URL without credentials."""
        return self._store.shown(self._key(*parts)).removesuffix("/.")

    def lock(self) -> "RemoteStorage":
        """Become the one process that writes below the URL; `close` brings up what is left and gives it up."""
        self._owner = self._own(ObjectStore(self._store.url), say=self._say)
        return self

    def close(self) -> None:
        """End writing."""
        try:
            self.flush()
        except (OSError, StorageError) as error:
            self._say(f"not all of {self.shown()} could be brought up to date: {error}")
        owned, self._owner = self._owner, None
        if owned is not None:
            owned.release()

    def holder(self) -> str | None:
        """Return the process that writes below the URL; None where nobody does."""
        return owner(self._store, now=time.time())

    def open_for_writing(self, say: Callable[[str], None]) -> None:
        """Delete what attempts that count no more have left."""
        self._is_writer, self._say = True, say
        places = {f"{CHECKPOINTS}/{name_of(step)}": keys for step, keys in self._checkpoint_keys().items()}
        for place, keys in (places | {_START: self._store.keys(f"{_START}/")}).items():
            marker = f"{place}/{MANIFEST}"
            if f"{place}/{_DAMAGED}" in keys:
                continue
            with suppress(ValueError):  # a damaged manifest: nobody knows which files are its
                kept = f"{place}/{attempt_of(self._manifest(place))}/" if marker in keys else marker
                self._delete(key for key in keys if not key.startswith((kept, marker)))

    def path(self, *parts: str) -> str:
        """Return a path in the staging directory, with the file there if the store has it."""
        key = self._key(*parts)
        path = self._place(key)
        self._staging.fetch(key)
        return path

    def names(self, *parts: str) -> list[str]:
        """Return the names in a directory of the store."""
        prefix = "" if self._key(*parts) == "." else f"{self._key(*parts)}/"
        return sorted({key.removeprefix(prefix).partition("/")[0] for key in self._store.keys(prefix)})

    def exists(self, *parts: str) -> bool:
        """Return whether there is such a file."""
        key = self._key(*parts)
        return super().exists(key) or self._store.exists(key)

    def append_text(self, text: str, *parts: str) -> None:
        """Add to a text file's end; it is brought up with what else grows."""
        super().append_text(text, *parts)
        then, took = self._flushed
        if time.monotonic() - then > max(_FLUSH_S, took / _FLUSH_SHARE):
            try:
                self.flush()
            except OSError as error:
                self.num_failed_flushes += 1
                self._say(f"journal and ledger could not be brought to {self.shown()}, the run goes on: {error}")

    def read_text(self, *parts: str) -> str:
        """Return a text file's content."""
        self.path(*parts)
        return super().read_text(self._key(*parts))

    def read_table(self, *parts: str) -> pa.Table:
        """Return a Parquet file's table."""
        self.path(*parts)
        return super().read_table(self._key(*parts))

    def remove(self, *parts: str) -> None:
        """Delete a file, if there is one."""
        self._delete([self._key(*parts)])
        super().remove(self._key(*parts))

    def flush(self) -> None:
        """Bring up every file of the staging directory that has changed since it was.

        Raises:
            OSError: when the store does not take one.
            StorageError: when this process is the owner no more.
        """
        started = time.monotonic()
        self._must_own()
        try:
            self._staging.bring()
        finally:
            self._flushed = (time.monotonic(), time.monotonic() - started)

    def fault_counts(self) -> dict[str, int]:
        """Return how often what grows could not be brought up."""
        return {"num_failed_flushes": self.num_failed_flushes}

    def checkpoints(self) -> list[int]:
        """Return the steps that have a manifest, ascending."""
        found = self._checkpoint_keys()
        return sorted(step for step, keys in found.items() if f"{CHECKPOINTS}/{name_of(step)}/{MANIFEST}" in keys)

    def damaged_checkpoints(self) -> list[str]:
        """Return the names of checkpoints that were set aside."""
        ending = f"/{_DAMAGED}"
        return [key.split("/")[1] for key in self._store.keys(f"{CHECKPOINTS}/") if key.endswith(ending)]

    def checkpoint(self, step: int) -> str:
        """Return the URL of the attempt that counts."""
        return self.address(CHECKPOINTS, name_of(step), attempt_of(self._manifest(f"{CHECKPOINTS}/{name_of(step)}")))

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Return step and URL of the newest whole checkpoint, None where there is none."""
        for step in reversed(self.checkpoints()):
            damage = self._damage(step)
            if damage is None:
                return step, self.checkpoint(step)
            if not self._store.exists(f"{CHECKPOINTS}/{name_of(step)}/{MANIFEST}"):  # deleted, for newer ones
                return self.newest_checkpoint()
            if self._is_writer:
                self._keep_damaged(step)
                self._delete([f"{CHECKPOINTS}/{name_of(step)}/{MANIFEST}"])
            self._say(
                f"checkpoint {step} is damaged and not used: {damage} ({self.shown(CHECKPOINTS, name_of(step))}); "
                "an older one is looked for"
            )
        return None

    def begin_checkpoint(self, step: int) -> str:
        """Return a new URL to bring a checkpoint's files to."""
        self.abandon_checkpoint(step)
        self._begun[step] = self.address(CHECKPOINTS, name_of(step), secrets.token_hex(4))
        self._hashes[self._begun[step]] = {}
        return self._begun[step]

    def commit_checkpoint(self, step: int, *, files: Iterable[str] = ()) -> None:
        """Make the attempt that was begun the one that counts."""
        assert step in self._begun, f"checkpoint {step} must be begun before it is committed"
        directory = self._begun[step]
        hashes = self._delivered_hashes(directory)
        missing = sorted(set(files) - set(hashes))
        if missing:
            raise StorageError(
                f"{self.shown(directory)} must hold all files of the ranks, and lacks {missing}; "
                "see that all nodes reach the same object store, under the same URL"
            )
        self.flush()
        self._must_own()
        marker = f"{CHECKPOINTS}/{name_of(step)}/{MANIFEST}"
        if self._store.exists(marker):
            damage = self._damage(step)
            if damage is None:
                self.abandon_checkpoint(step)
                return
            self._say(f"checkpoint {step} is damaged and written again: {damage}")
            self._keep_damaged(step)
            self._must_own()
        self._store.write(marker, _manifest_in(directory, hashes))
        self._whole.add(directory)
        del self._begun[step], self._hashes[directory]

    def abandon_checkpoint(self, step: int) -> None:
        """Delete what was begun for a step; a store that refuses keeps it until the next opening."""
        directory = self._begun.pop(step, None)
        if directory is not None:
            self._hashes.pop(directory, None)
            with suppress(OSError, StorageError):
                self._delete(self._store.keys(f"{self._key(directory)}/"))

    def keep_checkpoints(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints."""
        assert count > 0, f"at least one checkpoint must be kept, got {count}"
        for step in self.checkpoints()[:-count]:
            prefix = f"{CHECKPOINTS}/{name_of(step)}/"
            self._delete([prefix + MANIFEST])  # never seen half deleted
            self._delete(self._store.keys(prefix))

    def starting_model(self) -> str | None:
        """Return a path with the model that the run began with, None where it is not known yet."""
        if not self._store.exists(f"{_START}/{MANIFEST}"):
            return None
        return fetched(self._starting_model())

    def model_for_workers(self, model_dir: str) -> Any:
        """Return a model directory as processes on other hosts take it; only who writes here can bring it up."""
        if not self._store.exists(f"{_START}/{MANIFEST}"):
            if not self._is_writer:
                return model_dir
            attempt = self.address(_START, secrets.token_hex(4))
            bring(model_dir, ObjectStore(attempt), has_hashes=True)
            self._begin_with(attempt)
        return OnEachHost(self._starting_model())

    @contextmanager
    def model_under_way(self, model_dir: str) -> Iterator[str]:
        """Yield a URL that a process on any host writes the starting model to; `model_dir` then holds it here, too."""
        attempt = self.address(_START, secrets.token_hex(4))
        yield attempt
        self._begin_with(attempt)

        def copy(building: str) -> None:
            shutil.copytree(fetched(attempt), building, dirs_exist_ok=True)

        build_once(model_dir, copy)

    def _begin_with(self, attempt: str) -> None:
        hashes = self._delivered_hashes(attempt)
        self._must_own()
        self._store.write(f"{_START}/{MANIFEST}", _manifest_in(attempt, hashes))

    def _starting_model(self) -> str:
        return self.address(_START, attempt_of(self._manifest(_START)))

    def _key(self, *parts: str) -> str:
        """Return the key that parts name; the first one may be a URL below this one."""
        return os.path.normpath("/".join(parts).removeprefix(self._store.url).lstrip("/") or ".")

    def _place(self, *parts: str) -> str:
        return super()._place(self._key(*parts))

    def _replace(self, path: str, content: bytes | pa.Buffer) -> None:
        """Put a file in its place, here and in the store; a checkpoint's only there."""
        self._must_own()
        key = os.path.relpath(path, self.directory)
        directory = self.address(os.path.dirname(key))
        if directory in self._hashes:
            self._store.write(key, bytes(content))
            self._hashes[directory][os.path.basename(key)] = hashlib.sha256(content).hexdigest()
            return
        self._store.write(key, bytes(content))
        super()._replace(path, content)
        self._staging.is_brought(key)

    def _delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if keys:
            self._must_own()
        for key in keys:
            self._store.delete(key)

    def _must_own(self) -> None:
        """Make sure that no other process writes here; a reader, who adds a report for instance, owns nothing."""
        if self._owner is not None:
            self._owner.check()

    def _checkpoint_keys(self) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for key in self._store.keys(f"{CHECKPOINTS}/"):
            step = step_of(key.partition("/")[2].partition("/")[0])
            if step is not None:
                found.setdefault(step, []).append(key)
        return found

    def _manifest(self, place: str) -> dict[str, str]:
        """Return the manifest of a directory of attempts."""
        return parse_manifest(self._store.read(self._key(place, MANIFEST)).decode())

    def _delivered_hashes(self, directory: str) -> dict[str, str]:
        """Return name -> hash of an attempt's files, as those who brought them said."""
        hashes = dict(self._hashes.get(directory, {}))
        for key in self._store.keys(f"{self._key(directory)}/"):
            if key.endswith(HASHES):
                hashes |= parse_manifest(self._store.read(key).decode())
        return hashes

    def _damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint, None if it is whole.

        Its files are read once in a process's life, piece by piece; from then on they only have to be there.
        """
        prefix = f"{CHECKPOINTS}/{name_of(step)}/"
        try:
            hashes = self._manifest(prefix)
            is_known = self.address(prefix, attempt_of(hashes)) in self._whole
            there = set(self._store.keys(prefix))
            for name, expected in hashes.items():
                if prefix + name not in there:
                    return f"{name} is not there"
                if not is_known and self._store.sha256(prefix + name) != expected:
                    return f"{name} does not match its recorded hash"
        except FileNotFoundError as error:
            return f"{error.filename} is not there"
        except ValueError as error:
            return f"{MANIFEST} is not as it was written: {error}"
        self._whole.add(self.address(prefix, attempt_of(hashes)))
        return None

    def _keep_damaged(self, step: int) -> None:
        """Leave a damaged checkpoint's files for people to look at."""
        prefix = f"{CHECKPOINTS}/{name_of(step)}/"
        self._must_own()
        self._store.write(prefix + _DAMAGED, self._store.read(prefix + MANIFEST))


def _manifest_in(attempt: str, hashes: dict[str, str]) -> bytes:
    """Return the manifest that stands above an attempt's directory."""
    name = attempt.rpartition("/")[2]
    return render_manifest({f"{name}/{file}": found for file, found in hashes.items()}).encode()
