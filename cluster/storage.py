"""The run directory: what lies where, and writes that are either whole or absent.

config.yaml            the resolved configuration
metrics.jsonl          one line a step, appended; compacted to metrics.parquet
rollouts/step-N.parquet     what step N trained on: the redo log
evaluation/step-N.parquet   held-out responses of policy version N
checkpoints/step-N/    resumable state; `checkpoints.py` says when it is whole
ledger.sqlite          what happened to each group, for people to read
processes.json         what each process does now, for people to read
trackers.json          ids of the pages that MLflow and W&B have of the run
incarnation            the last number given to a lineage of weights
policy/                the last policy, for `from_pretrained`
tensorboard/           event files
summary.json           counts, quarantined rows, headline figures

A file or checkpoint is made under a temporary name, synced, renamed, and its directory synced.  An example: a process
that is killed over checkpoint 6 leaves `step-4` as it was and `step-6.<process>-<number>.tmp`, which the next process
to open the directory for writing removes.  A process uses no name twice, so that what a lost rank still writes disturbs
nobody.

`RunStorage` is a run directory on a POSIX file system.  One in an object store has the same methods and is
`remote_storage.py`'s, whose `open_storage` returns the right one for a path or a URL.
"""

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.faults import fault
from cluster.checkpoints import MANIFEST, damage_of, files_of, manifest_of, name_of, step_of
from cluster.lock import FileLock, Lock, lock_holder

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_LOCK = ".lock"
TEMPORARY = re.compile(r".+\.\d+-\d+\.tmp")


class StorageError(RuntimeError):
    """The run directory cannot serve; the message names the path and the remedy."""


class Disk:
    """Every operation that changes the disk, each announced before it happens: the place where tests let it fail."""

    def announce(self, operation: str, path: str) -> None:
        """Reach the fault point of an operation."""
        fault(f"storage.{operation}")

    def write(self, path: str, content: bytes | pa.Buffer, *, is_added: bool = False) -> None:
        """Write a file, or add to its end, and sync it; what fails may leave part of the content."""
        self.announce("write", path)
        with open(path, "ab" if is_added else "wb") as file:
            file.write(content)
            file.flush()
            self.announce("sync", path)
            os.fsync(file.fileno())

    def truncate(self, path: str, size: int) -> None:
        """Cut a file's end off."""
        self.announce("truncate", path)
        os.truncate(path, size)

    def sync(self, path: str) -> None:
        """Sync a file, or a directory: the names in it."""
        self.announce("sync", path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Give a file or a directory another name; a file that has it is replaced."""
        self.announce("rename", target)
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Delete a file."""
        self.announce("unlink", path)
        os.unlink(path)

    def make_directory(self, path: str) -> None:
        """Make a directory that lasts, with those above it."""
        if not os.path.isdir(path):
            self.make_directory(os.path.dirname(path))
            self.announce("mkdir", path)
            with suppress(FileExistsError):
                os.mkdir(path)
            self.sync(os.path.dirname(path))

    def remove(self, path: str) -> None:
        """Delete a file, or a directory and all in it, entry by entry."""
        if os.path.isdir(path) and not os.path.islink(path):
            for name in sorted(os.listdir(path)):
                self.remove(os.path.join(path, name))
            self.announce("rmdir", path)
            os.rmdir(path)
        elif os.path.lexists(path):
            self.unlink(path)


POSIX = Disk()


class RunStorage:
    """Reads and writes one run directory on a POSIX file system.

    Where a method takes `parts`, they name a place in the run directory; the first may also be a directory that this
    storage returned.

    Args:
        directory: the run directory.
        disk: changes it.
    """

    def __init__(self, directory: str, disk: Disk = POSIX) -> None:
        self.directory = os.path.abspath(directory)
        self._disk = disk
        self._is_writer = False
        self._say: Callable[[str], None] = logger.warning
        self._begun: dict[int, str] = {}  # step -> the directory in which its checkpoint is made
        self._numbers = itertools.count()  # of temporary names

    @property
    def name(self) -> str:
        """The run's: the last part of where it is."""
        return os.path.basename(self.directory)

    def address(self, *parts: str) -> str:
        """Return where something is, for processes on any host."""
        return os.path.join(self.directory, *parts)

    def shown(self, *parts: str) -> str:
        """Return where something is, for people."""
        return self.address(*parts)

    def lock(self) -> Lock:
        """Keep all other processes from writing here until the lock is closed.

        Raises:
            TakenError: when another process has it.
        """
        return FileLock(self.path(_LOCK))

    def holder(self) -> str | None:
        """Return the process that has the lock; None where nobody has."""
        return lock_holder(self.path(_LOCK)) if self.exists(_LOCK) else None

    def open_for_writing(self, say: Callable[[str], None]) -> None:
        """Clear away what a crash left; only for the process that has claimed the directory.

        Args:
            say: is told of damaged checkpoints, from now on.
        """
        self._is_writer, self._say = True, say
        for path in list(self._leftovers()):
            self._disk.remove(path)

    def path(self, *parts: str) -> str:
        """Return a path inside the run directory, its parent made."""
        return self._place(*parts)

    def names(self, *parts: str) -> list[str]:
        """Return the names in a directory, in order; none where there is no such directory."""
        path = os.path.join(self.directory, *parts)
        return sorted(os.listdir(path)) if os.path.isdir(path) else []

    def exists(self, *parts: str) -> bool:
        """Return whether something lies there."""
        return os.path.exists(os.path.join(self.directory, *parts))

    def write_text(self, text: str, *parts: str) -> None:
        """Write a text file, whole or not at all."""
        self._replace(self._place(*parts), text.encode())

    def append_text(self, text: str, *parts: str) -> None:
        """Add to a text file's end; what fails leaves it as it was, only a crash may leave part of the text."""
        path = self.path(*parts)
        if not os.path.exists(path):
            self._replace(path, b"")
        size = os.path.getsize(path)
        try:
            self._disk.write(path, text.encode(), is_added=True)
        except OSError:
            self._disk.truncate(path, size)
            raise

    def read_text(self, *parts: str) -> str:
        """Return a text file's content."""
        with open(os.path.join(self.directory, *parts), encoding="utf-8") as file:
            return file.read()

    def write_table(self, table: pa.Table, *parts: str) -> None:
        """Write a Parquet file, whole or not at all, with the metadata of the table's schema."""
        content = pa.BufferOutputStream()
        # Tokens and log-probs seldom repeat: to look for what does takes three times as long as writing them.
        settings = {"use_dictionary": False, "compression": "zstd"}
        with pq.ParquetWriter(content, table.schema, write_page_checksum=True, **settings) as writer:
            writer.write_table(table)
        self._replace(self._place(*parts), content.getvalue())

    def read_table(self, *parts: str) -> pa.Table:
        """Return a Parquet file's table, `schema.metadata` as it was written."""
        return pq.read_table(os.path.join(self.directory, *parts), page_checksum_verification=True)

    def remove(self, *parts: str) -> None:
        """Delete what lies there, if anything does."""
        self._disk.remove(os.path.join(self.directory, *parts))

    def fault_counts(self) -> dict[str, int]:
        """Return counters of what went wrong here and ended nothing."""
        return {}

    def starting_model(self) -> str | None:
        """Return where the model that the run began with is kept; None where it is not."""
        return None

    def model_for_workers(self, model_dir: str) -> Any:
        """Return a model directory as it is handed to processes on any host."""
        return model_dir

    @contextmanager
    def model_under_way(self, model_dir: str) -> Iterator[str]:
        """Yield where a process on any host writes the starting model, which is in `model_dir` after the block."""
        yield model_dir

    def checkpoints(self) -> list[int]:
        """Return the steps that have a committed checkpoint, ascending; it may be damaged since."""
        steps = [step_of(name) for name in self.names(CHECKPOINTS)]
        return sorted(step for step in steps if step is not None)

    def damaged_checkpoints(self) -> list[str]:
        """Return the names of checkpoints that were set aside."""
        return [name for name in self.names(CHECKPOINTS) if name.endswith(".damaged")]

    def checkpoint(self, step: int) -> str:
        """Return the directory of a step's committed checkpoint."""
        return os.path.join(self.directory, CHECKPOINTS, name_of(step))

    def newest_checkpoint(self) -> tuple[int, str] | None:
        """Return step and directory of the newest whole checkpoint, None where there is none.

        A damaged one is said and left out; the process that writes the directory renames it `step-N.damaged`.
        """
        for step in reversed(self.checkpoints()):
            directory = self.checkpoint(step)
            damage = damage_of(directory)
            if damage is None:
                return step, directory
            if not os.path.lexists(directory):  # deleted by its owner meanwhile, for newer ones
                return self.newest_checkpoint()
            kept = self._set_aside(directory) if self._is_writer else directory
            self._say(f"checkpoint {step} is damaged and not used: {damage} ({kept}); an older one is looked for")
        return None

    def begin_checkpoint(self, step: int) -> str:
        """Return a new directory to write a checkpoint's files into; one begun before for the step is abandoned."""
        self.abandon_checkpoint(step)
        self._begun[step] = self._temporary_name(self.path(CHECKPOINTS, name_of(step)))
        self._disk.make_directory(self._begun[step])
        return self._begun[step]

    def commit_checkpoint(self, step: int, *, files: Iterable[str] = ()) -> None:
        """Make the checkpoint that was begun the step's; one that is there and whole stays in its place.

        Args:
            step: a step whose files are all written.
            files: names, relative to its directory, that must be among them.

        Raises:
            StorageError: when a file of `files` is not there.
            OSError: when the disk does not take it; `abandon_checkpoint` clears up.
        """
        assert step in self._begun, f"checkpoint {step} must be begun before it is committed"
        directory, final = self._begun[step], self.checkpoint(step)
        missing = sorted(set(files) - set(files_of(directory)))
        if missing:
            raise StorageError(
                f"{directory} must hold all files of the ranks, and lacks {missing}; "
                "choose a run.dir on a file system that all nodes share, or in an object store"
            )
        if os.path.exists(final) and damage_of(final) is None:
            self.abandon_checkpoint(step)
        else:
            self._seal(directory)
            if os.path.exists(final):
                self._say(f"checkpoint {step} is damaged and written again; the old one is {self._set_aside(final)}")
            self._disk.rename(directory, final)
            del self._begun[step]
        self._disk.sync(os.path.dirname(final))

    def abandon_checkpoint(self, step: int) -> None:
        """Remove what was begun for a step, if anything was; a disk that refuses keeps it until the next opening."""
        directory = self._begun.pop(step, None)
        if directory is not None:
            with suppress(OSError):
                self._disk.remove(directory)

    def keep_checkpoints(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints."""
        assert count > 0, f"at least one checkpoint must be kept, got {count}"
        for step in self.checkpoints()[:-count]:
            doomed = self._temporary_name(self.checkpoint(step))
            self._disk.rename(self.checkpoint(step), doomed)  # never seen half deleted
            self._disk.remove(doomed)

    def _place(self, *parts: str) -> str:
        path = os.path.join(self.directory, *parts)
        self._disk.make_directory(os.path.dirname(path))
        return path

    def _seal(self, directory: str) -> None:
        """Make a directory's files last, then the manifest that says so."""
        for name in files_of(directory):
            self._disk.sync(os.path.join(directory, name))
        self._disk.write(os.path.join(directory, MANIFEST), manifest_of(directory).encode())
        self._disk.sync(directory)

    def _set_aside(self, directory: str) -> str:
        """Rename a damaged checkpoint; return its new path."""
        endings = itertools.chain([".damaged"], (f".damaged-{number}" for number in itertools.count(2)))
        target = next(path for ending in endings if not os.path.lexists(path := directory + ending))
        self._disk.rename(directory, target)
        self._disk.sync(os.path.dirname(directory))
        return target

    def _replace(self, path: str, content: bytes | pa.Buffer) -> None:
        with _removed_on_error(self._disk, self._temporary_name(path)) as temporary:
            self._disk.write(temporary, content)
            self._disk.rename(temporary, path)
        self._disk.sync(os.path.dirname(path))

    def _leftovers(self) -> Iterator[str]:
        for root, directories, files in os.walk(self.directory):
            found = [name for name in (*directories, *files) if TEMPORARY.fullmatch(name)]
            # a committed checkpoint stays as its manifest says
            directories[:] = [name for name in directories if name not in found and step_of(name) is None]
            yield from (os.path.join(root, name) for name in sorted(found))

    def _temporary_name(self, path: str) -> str:
        """Return a name beside `path`, free and never given before; what has it at the next opening is removed."""
        names = (f"{path}.{os.getpid()}-{number}.tmp" for number in self._numbers)
        return next(name for name in names if not os.path.lexists(name))


@contextmanager
def _removed_on_error(disk: Disk, path: str) -> Iterator[str]:
    """Yield a path; what lies there is removed when the block fails, if the disk lets it."""
    try:
        yield path
    except BaseException:
        with suppress(OSError):
            disk.remove(path)
        raise
