"""Objects below one URL (s3://, gs://, az://, file://, ...), through fsspec; who may write them is not decided here.

An object is put whole or not at all, which is what stores promise.  Whatever a file system's library raises becomes an
OSError that names the object; what may pass is tried again.  Credentials are the library's business: they come from
the environment, and what a URL holds of them is left out of every message.
"""

import errno
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from actors.faults import fault

_PAUSES_S = (1.0, 3.0, 9.0)
"""Between two attempts at an operation."""
_BLOCK_BYTES = 16 * 2**20

Answer = TypeVar("Answer")


def is_url(place: str) -> bool:
    """Return whether a run directory is a URL, and not a path."""
    return "://" in place


def without_credentials(url: str) -> str:
    """Return a URL as it may be shown, e.g. sftp://host/runs for sftp://user:secret@host/runs?token=1."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2] if ":" in parts.netloc.rpartition("@")[0] else parts.netloc
    return f"{parts.scheme}://{host}{parts.path}"


class ObjectStore:
    """Every operation on the objects below a URL, each of which `announce` hears of first: tests let it fail there.

    Args:
        url: what all keys start from; a key is a relative path like rollouts/step-1.parquet.
        sleep: waits, seconds.
    """

    def __init__(self, url: str, *, sleep: Callable[[float], None] = time.sleep) -> None:
        from fsspec.core import url_to_fs

        # Another process may have changed anything since it was listed.
        options: dict[str, Any] = {"use_listings_cache": False}
        if urlsplit(url).scheme in ("file", "local"):
            options["auto_mkdir"] = True  # elsewhere a directory is a part of a name
        self.url = url.rstrip("/")
        self._files, root = url_to_fs(self.url, **options)
        self._root = str(root).rstrip("/")
        self._sleep = sleep

    def announce(self, operation: str, key: str) -> None:
        """Reach the fault point of an operation."""
        fault(f"store.{operation}")

    def shown(self, key: str = "") -> str:
        """Return an object's URL for people."""
        return without_credentials(f"{self.url}/{key}".rstrip("/"))

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects below a prefix, which ends like a directory, in order."""
        found: list[str] = self._do("list", prefix, lambda: self._files.find(self._path(prefix).rstrip("/")))
        return sorted(path.removeprefix(self._root).lstrip("/") for path in map(str, found))

    def exists(self, key: str) -> bool:
        """Return whether there is such an object."""
        is_there: bool = self._do("look", key, lambda: self._files.isfile(self._path(key)))
        return is_there

    def read(self, key: str) -> bytes:
        """Return an object's content; FileNotFoundError where there is none."""
        content: bytes = self._do("read", key, lambda: self._files.cat_file(self._path(key)))
        return content

    def sha256(self, key: str) -> str:
        """Return the hash of an object's content, read piece by piece."""
        return self._do("read", key, lambda: self._hash(key))

    def fetch(self, key: str, path: str) -> None:
        """Copy an object to a file of this host, whose directory is there."""
        self._do("fetch", key, lambda: self._files.get_file(self._path(key), path))

    def write(self, key: str, content: bytes) -> None:
        """Put an object in the place of what has its key."""
        self._do("write", key, lambda: self._files.pipe_file(self._path(key), content))

    def upload(self, path: str, key: str) -> None:
        """Put a file of this host as an object in the place of what has its key."""
        self._do("upload", key, lambda: self._files.put_file(path, self._path(key)))

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""

        def delete() -> None:
            with suppress(FileNotFoundError):
                self._files.rm_file(self._path(key))

        self._do("delete", key, delete)

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    def _hash(self, key: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(self._path(key), "rb", block_size=_BLOCK_BYTES) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _do(self, operation: str, key: str, act: Callable[[], Answer]) -> Answer:
        """Act, again after a pause where that may help.

        Raises:
            OSError: FileNotFoundError and PermissionError as they come, other failures as one that names the object.
        """
        for pause in (*_PAUSES_S, None):
            try:
                self.announce(operation, key)
                return act()
            except (FileNotFoundError, PermissionError) as error:
                raise type(error)(error.errno or errno.ENOENT, self._reason(error), self.shown(key)) from None
            except Exception as error:  # whatever a store's library raises
                if pause is None:
                    raise OSError(_number(error), self._reason(error), self.shown(key)) from None
            self._sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _reason(self, error: Exception) -> str:
        """Return an error in one line, without the URL's own words, which may hold credentials."""
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            text = error.strerror or str(error)
        secret = urlsplit(self.url).netloc.rpartition("@")[0]
        return " ".join((text.replace(secret, "...") if secret else text).split())[:400]


def _number(error: Exception) -> int:
    return error.errno if isinstance(error, OSError) and error.errno else errno.EIO


def package_of(url: str) -> tuple[str, str]:
    """Return a URL's scheme, and the module that fsspec reads it with ("" where it knows none); imports neither."""
    from fsspec.registry import known_implementations, registry

    scheme = url.partition("://")[0]
    if scheme in registry:
        return scheme, registry[scheme].__module__
    known = known_implementations.get(scheme)
    return scheme, str(known["class"]).rpartition(".")[0] if known else ""
