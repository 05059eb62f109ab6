"""A checkpoint is whole or absent, whatever fails: each durable operation in turn, and the process itself.

Power loss cannot be played here: a rename whose files were not synced looks whole until the machine is off.  What can
be shown is the order of operations, and that is checked instead.
"""

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from cluster.checkpoints import damage_of
from cluster.storage import Disk, RunStorage

SHARES = ("learner-00001-of-00002.safetensors", "learner-00002-of-00002.safetensors")
FAILURES = {
    "no space once": (errno.ENOSPC, {"write", "sync", "mkdir", "rename"}, False),
    "no space from then on": (errno.ENOSPC, {"write", "sync", "mkdir", "rename"}, True),
    "error once": (errno.EIO, None, False),
    "error from then on": (errno.EIO, None, True),
}
"""Error number, which operations it hits, whether it stays."""


class TestedDisk(Disk):
    """Counts operations; what is asked of the n-th happens there, after half of the content if it is a write."""

    __test__ = False

    def __init__(self, nth=0, act=None):
        self.operations = []
        self._nth, self._act, self._writing = nth, act, None

    def announce(self, operation, path):
        super().announce(operation, path)
        self.operations.append((operation, path))
        if self._act and len(self.operations) >= self._nth:
            if operation == "write" and len(self.operations) == self._nth:
                self._write_half()
            self._act(operation, len(self.operations) == self._nth)

    def write(self, path, content, *, is_added=False):
        self._writing = (path, bytes(content), is_added)
        super().write(path, content, is_added=is_added)

    def _write_half(self):
        path, content, is_added = self._writing
        with open(path, "ab" if is_added else "wb") as file:
            file.write(content[: len(content) // 2])


def failing(nth, name):
    number, operations, stays = FAILURES[name]

    def act(operation, is_nth):
        if (is_nth or stays) and (operations is None or operation in operations):
            raise OSError(number, os.strerror(number))

    return TestedDisk(nth, act)


def killing(nth):
    return TestedDisk(nth, lambda operation, is_nth: os.kill(os.getpid(), signal.SIGKILL))


def content(step):
    """Return what a checkpoint of a step holds."""
    made = random.Random(step)
    return {name: made.randbytes(3000) for name in SHARES} | {"run.json": json.dumps({"step": step}).encode()}


def attempt(storage, step, keep=2):
    """Make a checkpoint as a run does; return whether it was said to be made."""
    try:
        directory = storage.begin_checkpoint(step)
        for name in SHARES:
            Path(directory, name).write_bytes(content(step)[name])
        storage.write_text(content(step)["run.json"].decode(), directory, "run.json")
        storage.commit_checkpoint(step, files=SHARES)
        storage.keep_checkpoints(keep)
    except OSError:
        storage.abandon_checkpoint(step)
        return False
    return True


def found_in(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.name != "manifest.json"}


def check(run_dir, *, at_least, made):
    """Check the claims: nothing that is there is damaged, the newest is good and not older than allowed."""
    storage = RunStorage(str(run_dir))
    for step in storage.checkpoints():
        directory = os.path.join(run_dir, "checkpoints", f"step-{step}")
        if step != 6 or found_in(directory).get("run.json") != b"damage":
            assert damage_of(directory) is None, f"checkpoint {step} is neither whole nor absent"
    step, directory = storage.newest_checkpoint()
    assert step == 6 if made else step >= at_least
    assert found_in(directory) == content(step)


def check_retry(run_dir):
    """The next process clears up, and makes the checkpoint."""
    storage, said = RunStorage(str(run_dir)), []
    storage.open_for_writing(said.append)
    assert attempt(storage, 6)
    names = {name for name in os.listdir(run_dir / "checkpoints") if not name.startswith("step-6.damaged")}
    assert names == {"step-4", "step-6"}
    step, directory = storage.newest_checkpoint()
    assert (step, found_in(directory)) == (6, content(6))


@pytest.fixture(params=["absent", "damaged", "whole"])
def before(request, tmp_path):
    """A run directory with checkpoints 2 and 4, and what there is of checkpoint 6; and the oldest step to be used."""
    storage = RunStorage(str(tmp_path / "before"))
    for step in (2, 4) if request.param == "absent" else (2, 4, 6):
        attempt(storage, step, keep=3)
    if request.param == "damaged":
        (tmp_path / "before" / "checkpoints" / "step-6" / "run.json").write_text("damage")
    return tmp_path / "before", 6 if request.param == "whole" else 4


def copies(before, tmp_path):
    """Yield 1, 2, ... with a fresh copy of a run directory for each."""
    for nth in range(1, 200):
        run_dir = tmp_path / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(before, run_dir)
        yield nth, run_dir
    raise AssertionError("no end of operations")


def fail_every_operation(before, tmp_path, name, storage_class=RunStorage):
    """Fail the first, second, ... operation until none is left to fail; return how many there were."""
    start, at_least = before
    for nth, run_dir in copies(start, tmp_path):
        disk = failing(nth, name)
        made = attempt(storage_class(str(run_dir), disk), 6)
        check(run_dir, at_least=at_least, made=made)
        check_retry(run_dir)
        if len(disk.operations) < nth:
            assert made
            return nth - 1
    return None


def kill_at_every_operation(before, tmp_path, storage_class=RunStorage):
    """Kill a process at the first, second, ... operation until it comes through; return how many there were."""
    start, at_least = before
    for nth, run_dir in copies(start, tmp_path):
        child = os.fork()
        if child == 0:
            made = False
            try:
                made = attempt(storage_class(str(run_dir), killing(nth)), 6)
            finally:
                os._exit(0 if made else 1)
        status = os.waitpid(child, 0)[1]
        made = os.WIFEXITED(status)
        assert os.WEXITSTATUS(status) == 0 if made else os.WTERMSIG(status) == signal.SIGKILL
        check(run_dir, at_least=at_least, made=made)
        check_retry(run_dir)
        if made:
            return nth - 1
    return None


@pytest.mark.parametrize("name", FAILURES)
def test_whole_or_absent_when_any_operation_fails(before, tmp_path, name):
    assert fail_every_operation(before, tmp_path, name) >= 15


def test_whole_or_absent_when_killed_at_any_operation(before, tmp_path):
    assert kill_at_every_operation(before, tmp_path) >= 15


HOW = {
    "error": lambda before, tmp_path, bug: fail_every_operation(before, tmp_path, "error once", bug),
    "kill": kill_at_every_operation,
}


class InPlace(RunStorage):
    """Planted bug: files are written where the checkpoint will be."""

    def begin_checkpoint(self, step):
        directory = os.path.join(self.directory, "checkpoints", f"step-{step}")
        self._disk.make_directory(directory)
        return directory

    def commit_checkpoint(self, step, *, files=()):
        self._seal(os.path.join(self.directory, "checkpoints", f"step-{step}"))


class OldOneFirst(RunStorage):
    """Planted bug: the checkpoint that is there goes before the new one comes."""

    def commit_checkpoint(self, step, *, files=()):
        self.remove("checkpoints", f"step-{step}")
        super().commit_checkpoint(step, files=files)


class ManifestFirst(RunStorage):
    """Planted bug: hashes are taken before the files are complete."""

    def commit_checkpoint(self, step, *, files=()):
        share = Path(self._begun[step], SHARES[1])
        whole = share.read_bytes()
        share.write_bytes(whole[:-1])
        super().commit_checkpoint(step, files=files)
        Path(self.directory, "checkpoints", f"step-{step}", SHARES[1]).write_bytes(whole)


@pytest.mark.parametrize("storage_class", [InPlace, OldOneFirst, ManifestFirst])
@pytest.mark.parametrize("how", HOW)
def test_the_claims_find_planted_bugs(tmp_path, storage_class, how):
    start = tmp_path / "before"
    steps = (2, 4, 6) if storage_class is OldOneFirst else (2, 4)
    for step in steps:
        attempt(RunStorage(str(start)), step, keep=3)
    before = (start, max(steps))
    with pytest.raises(AssertionError):
        HOW[how](before, tmp_path, storage_class)


def unsynced(operations, run_dir):
    """Return what was not synced before the rename that makes it visible, or after it."""
    final = os.path.join(run_dir, "checkpoints", "step-6")
    moment = operations.index(("rename", final))
    before = {os.path.basename(path) for operation, path in operations[:moment] if operation == "sync"}
    wanted = {*SHARES, "run.json", "manifest.json"}
    directories = [name for name in before if name.startswith("step-6.")]
    is_last = ("sync", os.path.dirname(final)) in operations[moment:]
    return sorted(wanted - before) + ([] if directories else ["directory"]) + ([] if is_last else ["checkpoints"])


class Unsynced(TestedDisk):
    """Planted bug: files are synced, directories are not."""

    def sync(self, path):
        if not os.path.isdir(path):
            super().sync(path)


def test_everything_is_synced_before_it_is_visible(tmp_path):
    disk = TestedDisk()
    assert attempt(RunStorage(str(tmp_path), disk), 6)
    assert unsynced(disk.operations, tmp_path) == []
    disk = Unsynced()
    assert attempt(RunStorage(str(tmp_path / "planted"), disk), 6)
    assert unsynced(disk.operations, tmp_path / "planted") == ["directory", "checkpoints"]
