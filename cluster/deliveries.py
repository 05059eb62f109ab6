"""Directories that processes on several hosts write and read together: in place, or below a URL.

With a path, the hosts share a file system, and nothing happens here.  With a URL, who writes does so on its own disk
and brings the files up after, and who reads gets them down first, once for all processes of a host:

    checkpoints/step-6/3f2a91bc/learner-00001-of-00002.safetensors    brought by rank 0 of an attempt at checkpoint 6
    checkpoints/step-6/3f2a91bc/5d01e7aa.hashes                       after it, what it is to hash to
    checkpoints/step-6/manifest.json                                  last, by the driver: the attempt that counts

An attempt has a name of its own, so that what a lost rank still brings disturbs nobody.
"""

import errno
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from actors.cache import cache_directory, content_hash, locked
from cluster.checkpoints import MANIFEST, files_of, parse_manifest, render_manifest, sha256_of
from cluster.object_store import ObjectStore, is_url

HASHES = ".hashes"
"""Last part of the name of what says the hashes of the files that one process has brought."""


class OnEachHost:
    """A delivered directory as an argument of a process: what arrives there is the path of that host's own copy."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __reduce__(self) -> tuple[Callable[[str], str], tuple[str]]:
        return fetched, (self.address,)


@contextmanager
def scratch(name: str) -> Iterator[str]:
    """Yield a new directory on this host's disk, which goes with the block; also what dead processes left there."""
    root = os.path.join(cache_directory(), "staging")
    os.makedirs(root, exist_ok=True)
    mine = f"{socket.gethostname()}-"
    for leftover in os.listdir(root):
        process = leftover.removeprefix(mine).partition("-")[0]
        if leftover.startswith(mine) and process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(os.path.join(root, leftover), ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{mine}{os.getpid()}-", dir=root, ignore_cleanup_errors=True) as made:
        directory = os.path.join(made, name)
        os.mkdir(directory)
        yield directory


@contextmanager
def delivered(directory: str, *, has_hashes: bool = False) -> Iterator[str]:
    """Yield a path to write files to that are to lie in a directory; below a URL, they are brought there after.

    Args:
        directory: a path or a URL.
        has_hashes: below a URL, say after them what they are to hash to.
    """
    if not is_url(directory):
        yield directory
        return
    with scratch("files") as local:
        yield local
        bring(local, ObjectStore(directory), has_hashes=has_hashes)


def bring(local: str, store: ObjectStore, *, has_hashes: bool) -> dict[str, str]:
    """Upload the files of a directory, and after them their hashes if that is wanted; return these.

    A model's config.json comes last and the one before it goes first: without it, `from_pretrained` takes nothing.
    """
    hashes = {name: sha256_of(os.path.join(local, name)) for name in files_of(local)}
    names = sorted(hashes, key=lambda name: name == "config.json")
    if "config.json" in hashes:
        store.delete("config.json")
    for name in names:
        store.upload(os.path.join(local, name), name)
    if has_hashes:
        store.write(f"{secrets.token_hex(4)}{HASHES}", render_manifest(hashes).encode())
    return hashes


def fetched(directory: str) -> str:
    """Return a path where the files of a directory are: itself, or this host's copy of what lies below a URL.

    The copy stays for the next process, until another attempt's is wanted in its place.  One process of the host gets
    it while others wait, and it is there when every file has its hash.

    Raises:
        FileNotFoundError: when the URL has no such attempt any more.
        OSError: when the store does not give it, or gives something else.
    """
    if not is_url(directory):
        return directory
    above, attempt = directory.rstrip("/").rsplit("/", 1)
    kind, name = above.rsplit("/", 1)
    root = os.path.join(cache_directory(), "fetched", content_hash(kind))
    local = os.path.join(root, f"{name}-{attempt}")
    with locked(root):
        if not os.path.isdir(local):
            if os.path.isdir(root):
                shutil.rmtree(root)
            _fetch(ObjectStore(above), attempt, f"{local}.part")
            os.rename(f"{local}.part", local)
    return local


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def attempt_of(hashes: Mapping[str, str]) -> str:
    """Return the attempt whose files a manifest names; ValueError where it names none."""
    attempts = {name.partition("/")[0] for name in hashes}
    if len(attempts) != 1:
        raise ValueError(f"it names the files of {len(attempts)} attempts")
    return attempts.pop()


def _fetch(store: ObjectStore, attempt: str, local: str) -> None:
    hashes = parse_manifest(store.read(MANIFEST).decode())
    if attempt_of(hashes) != attempt:
        raise FileNotFoundError(errno.ENOENT, f"attempt {attempt} is not the one that counts any more", store.shown())
    for key, expected in hashes.items():
        path = os.path.join(local, key.removeprefix(f"{attempt}/"))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        store.fetch(key, path)
        if (found := sha256_of(path)) != expected:
            raise OSError(f"{store.shown(key)} must have the hash {expected}, and what came here has {found}")
