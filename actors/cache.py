"""Directories that are built once and then found by a hash of what went into them."""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def cache_directory() -> str:
    """Return where models, data sets and trained starts are kept: $CONCORD_CACHE or ~/.cache/concord."""
    return os.path.abspath(os.environ.get("CONCORD_CACHE") or os.path.expanduser("~/.cache/concord"))


def content_hash(*parts: Any) -> str:
    """Return 20 hex digits that identify JSON-able `parts`, independent of the order of keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def build_once(directory: str, build: Callable[[str], None]) -> str:
    """Return the absolute path of `directory`, filled by `build(temporary directory)` unless it is already there.

    The directory appears by one rename, so a reader sees all of it or nothing, and of two processes that build at the
    same time one wins and the other throws its copy away.
    """
    directory = os.path.abspath(directory)
    if os.path.isdir(directory):
        return directory
    building = f"{directory}.building-{uuid.uuid4().hex[:8]}"
    os.makedirs(building)
    try:
        build(building)
        try:
            os.rename(building, directory)
        except OSError:
            if not os.path.isdir(directory):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return directory


@contextmanager
def locked(directory: str) -> Iterator[None]:
    """Let one process at a time build `directory`, which may take long; the others wait, and find it built."""
    os.makedirs(os.path.dirname(directory), exist_ok=True)
    with open(f"{directory}.lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace_directory(directory: str, build: Callable[[str], None], *, marker: str) -> str:
    """Fill `directory` by `build(temporary directory)` in place of an earlier result; return its absolute path.

    Args:
        directory: where the result shall be.
        build: writes it into an empty directory; if it fails, nothing is changed.
        marker: a file that every such result holds, so that nothing else is ever deleted.

    Raises:
        ValueError: if `directory` holds something else.
    """
    directory = os.path.abspath(directory)
    if os.path.isdir(directory) and os.listdir(directory) and not os.path.isfile(os.path.join(directory, marker)):
        raise ValueError(f"the output must be a new directory or an earlier result, got {directory!r} without {marker}")
    with swapped_in(directory) as building:
        build(building)
    return directory


@contextmanager
def swapped_in(directory: str) -> Iterator[str]:
    """Yield a new directory beside another, and put it, synced, in the other's place when the block succeeds.

    Where it fails, the other one is as it was.  A crash leaves `<directory>.<process>-<number>.tmp`, which a run clears
    away when it opens its directory.
    """
    temporary, former = (f"{directory}.{os.getpid()}-{number}.tmp" for number in range(2))
    for leftover in (temporary, former):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        os.makedirs(temporary)
        yield temporary
        for root, _, names in os.walk(temporary, topdown=False):
            for name in (*names, "."):
                _sync(os.path.join(root, name))
        if os.path.isdir(directory):
            os.rename(directory, former)
        os.rename(temporary, directory)
        _sync(os.path.dirname(directory))
    finally:
        if os.path.isdir(former) and not os.path.lexists(directory):
            os.rename(former, directory)
        for leftover in (temporary, former):
            shutil.rmtree(leftover, ignore_errors=True)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
