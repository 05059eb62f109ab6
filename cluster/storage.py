"""The run directory: what lies where, and writes that are either whole or absent.

config.yaml            the resolved configuration
metrics.jsonl          one line a step, appended; compacted to metrics.parquet
rollouts/step-N.parquet     what step N trained on
evaluation/step-N.parquet   held-out responses of policy version N
checkpoints/step-N/    resumable state
policy/                the last policy, for `from_pretrained`
tensorboard/           event files
summary.json           counts, quarantined rows, headline figures
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

MANIFEST = "manifest.json"


class StorageError(RuntimeError):
    """The run directory cannot serve; the message names the path and the remedy."""


class RunStorage:
    """Reads and writes one run directory on a POSIX file system."""

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)

    def path(self, *parts: str) -> str:
        """Return a path inside the run directory, its parent made."""
        path = os.path.join(self.directory, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def exists(self, *parts: str) -> bool:
        """Return whether something lies there."""
        return os.path.exists(os.path.join(self.directory, *parts))

    def write_text(self, text: str, *parts: str) -> None:
        """Write a text file, whole or not at all."""
        with replacing(self.path(*parts)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def read_text(self, *parts: str) -> str:
        """Return a text file's content."""
        with open(os.path.join(self.directory, *parts), encoding="utf-8") as file:
            return file.read()

    def write_table(self, table: pa.Table, *parts: str) -> None:
        """Write a Parquet file, whole or not at all."""
        with replacing(self.path(*parts)) as temporary:
            pq.write_table(table, temporary)
            _fsync(temporary)

    def read_table(self, *parts: str) -> pa.Table:
        """Return a Parquet file's table."""
        return pq.read_table(os.path.join(self.directory, *parts))

    def checkpoints(self) -> list[int]:
        """Return the steps that have a committed checkpoint, ascending."""
        root = os.path.join(self.directory, "checkpoints")
        names = os.listdir(root) if os.path.isdir(root) else []
        found = (re.fullmatch(r"step-(\d+)", name) for name in names)
        steps = (int(match.group(1)) for match in found if match)
        return sorted(step for step in steps if self.exists("checkpoints", f"step-{step}", MANIFEST))

    @contextmanager
    def writing_checkpoint(self, step: int) -> Iterator[str]:
        """Yield a directory to fill; on success hash, sync and rename it to `checkpoints/step-N`."""
        final = self.path("checkpoints", f"step-{step}")
        temporary = final + ".tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
        try:
            yield temporary
            _write_manifest(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _fsync(os.path.dirname(final))

    def read_checkpoint(self, step: int) -> str:
        """Return the directory of a checkpoint whose files match their hashes.

        Raises:
            StorageError: naming the damaged file.
        """
        directory = os.path.join(self.directory, "checkpoints", f"step-{step}")
        with open(os.path.join(directory, MANIFEST), encoding="utf-8") as file:
            manifest: dict[str, str] = json.load(file)
        for name, expected in manifest.items():
            path = os.path.join(directory, name)
            if not os.path.isfile(path) or _sha256(path) != expected:
                raise StorageError(
                    f"{path} must match its recorded hash and does not; delete {directory} to use an older checkpoint"
                )
        return directory

    def keep_checkpoints(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints."""
        for step in self.checkpoints()[:-count]:
            shutil.rmtree(os.path.join(self.directory, "checkpoints", f"step-{step}"))


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary path that replaces `path` when the block succeeds."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
        _fsync(os.path.dirname(path))
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _write_manifest(directory: str) -> None:
    hashes = {}
    for root, _, names in os.walk(directory):
        for name in sorted(names):
            path = os.path.join(root, name)
            _fsync(path)
            hashes[os.path.relpath(path, directory)] = _sha256(path)
    manifest = os.path.join(directory, MANIFEST)
    with open(manifest, "w", encoding="utf-8") as file:
        json.dump(hashes, file, indent=1, sort_keys=True)
    _fsync(manifest)
    _fsync(directory)


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
