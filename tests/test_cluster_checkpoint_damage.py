"""A damaged checkpoint is noticed, and real failures of the system do no damage: full disks, limits, a rank's end."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

import cluster.checkpoints
from cluster.checkpoints import damage_of
from cluster.storage import RunStorage
from tests.test_cluster_checkpoints import FAILURES, attempt, check, check_retry, content, failing, found_in

ROOT = Path(__file__).parent.parent


def damages(directory):
    """Yield what is damaged: bits at many places, lengths, missing files; the file is put back after each."""
    chosen = random.Random(0)
    for path in sorted(Path(directory).iterdir()):
        good = path.read_bytes()
        is_small = len(good) < 1000
        places = range(len(good)) if is_small else [0, 1, len(good) - 1, *chosen.sample(range(len(good)), 40)]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << chosen.randrange(8)
            path.write_bytes(bad)
            yield f"bit of byte {place} of {path.name}"
        lengths = range(len(good)) if is_small else [0, 1, len(good) - 1, *chosen.sample(range(len(good)), 20)]
        for length in lengths:
            path.write_bytes(good[:length])
            yield f"{path.name} ends at {length}"
        path.write_bytes(good + b"\n")
        yield f"{path.name} is longer"
        path.unlink()
        yield f"{path.name} is missing"
        path.write_bytes(good)


def undetected(run_dir):
    """Damage the newest checkpoint in every way; return what was not noticed, and how many ways there were."""
    said, missed, number = [], [], 0
    storage = RunStorage(str(run_dir))
    storage._say = said.append
    for damage in damages(run_dir / "checkpoints" / "step-6"):
        said.clear()
        step, directory = storage.newest_checkpoint()
        number += 1
        is_said = len(said) == 1 and said[0].startswith("checkpoint 6 is damaged and not used")
        if step != 4 or not is_said or found_in(directory) != content(4):
            missed.append(damage)
    assert storage.newest_checkpoint()[0] == 6
    return missed, number


def test_every_damage_is_noticed_said_and_the_checkpoint_before_used(tmp_path):
    for step in (4, 6):
        attempt(RunStorage(str(tmp_path)), step)
    missed, number = undetected(tmp_path)
    assert missed == []
    assert number > 700


@pytest.mark.parametrize("bug", ["sizes only", "manifest as it comes"])
def test_planted_bugs_miss_damage(tmp_path, monkeypatch, bug):
    if bug == "sizes only":
        monkeypatch.setattr(cluster.checkpoints, "sha256_of", lambda path: str(os.path.getsize(path)))
    for step in (4, 6):
        attempt(RunStorage(str(tmp_path)), step)
    if bug == "manifest as it comes":
        monkeypatch.setattr(cluster.checkpoints, "parse_manifest", json.loads)
    assert undetected(tmp_path)[0]


def test_a_manifest_in_which_one_file_has_anothers_name_is_damaged(tmp_path):
    """One bit makes file 1 of 3 file 3 of 3, and file 1 would go unchecked."""
    names = [f"learner-0000{rank}-of-00003.safetensors" for rank in (1, 2, 3)]
    for name in names:
        (tmp_path / name).write_text(name)
    text = cluster.checkpoints.manifest_of(str(tmp_path))
    (tmp_path / "manifest.json").write_text(text)
    assert damage_of(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text(text.replace("00001-of", "00003-of"))
    assert "it reads as something else" in damage_of(str(tmp_path))


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("write", ["text", "table"])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, name, write):
    """The redo log and all other files: whatever fails, the file that is there is whole."""

    def put(storage, number):
        if write == "text":
            storage.write_text(str(number), "rollouts", "file")
        else:
            storage.write_table(pa.table({"number": [number]}), "rollouts", "file")

    def get(storage):
        if write == "text":
            return int(storage.read_text("rollouts", "file"))
        return storage.read_table("rollouts", "file")["number"].to_pylist()[0]

    storage = RunStorage(str(tmp_path))
    put(storage, 0)
    for nth in range(1, 20):
        disk, old = failing(nth, name), get(storage)
        try:
            put(RunStorage(str(tmp_path), disk), nth)
        except OSError:
            assert get(storage) in (old, nth)
        else:
            assert get(storage) == nth
        storage.open_for_writing(print)
        assert os.listdir(tmp_path / "rollouts") == ["file"]
        if len(disk.operations) < nth:
            break
    assert nth == 5  # write, sync, rename, sync of the directory; the fifth is not reached


def test_a_file_size_limit_of_the_system_fails_like_a_full_disk(tmp_path):
    """Real partial writes: the kernel takes the first bytes of a file and refuses the rest."""
    for step in (2, 4):
        attempt(RunStorage(str(tmp_path)), step)
    child = os.fork()
    if child == 0:
        result = 1
        try:
            import resource

            for limit in (0, 1, 12, 300, 2000, 2999):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                assert not attempt(RunStorage(str(tmp_path)), 6)
                check(tmp_path, at_least=4, made=False)
            result = 0
        finally:
            os._exit(result)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-2", "step-4"]
    check_retry(tmp_path)


SMALL_DISK = """
import sys
from pathlib import Path
from cluster.storage import RunStorage
from tests.test_cluster_checkpoints import attempt, check
run_dir = Path(sys.argv[1])
storage = RunStorage(str(run_dir))
assert attempt(storage, 4)
outcomes = []
for size in range(100_000, 0, -4096):
    filler = run_dir / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            file.write(bytes(size))
        except OSError:
            pass
    outcomes.append(attempt(storage, 6))
    check(run_dir, at_least=4, made=outcomes[-1])
    filler.unlink()
    if outcomes[-1]:
        break
assert outcomes[-1] and outcomes.count(False) >= 3, outcomes
"""


def test_a_small_file_system_that_fills_up(tmp_path):
    """A real one, where this user may mount one."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    script = f"mount -t tmpfs -o size=64k tmpfs {tmp_path} && "
    if shutil.which("unshare") is None or subprocess.run([*mount, f"{script} true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    program = [sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    result = subprocess.run(
        [*mount, f'{script} exec "$@"', "sh", *program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


LEARNING = """
import sys
import torch
from cluster.storage import RunStorage
from tests.learner_toys import learner_config, learner_rank, toy_batch
torch.set_num_threads(1)
toy, run_dir = sys.argv[1:]
config = learner_config()
learner, storage = learner_rank(toy, config), RunStorage(run_dir)
for step, is_made in ((1, True), (2, False), (2, True), (3, False)):
    batch = toy_batch(toy, config, step=step)
    learner.step(batch.tables, batch.plan)
    learner.begin_save(storage.begin_checkpoint(step))
    try:
        storage.commit_checkpoint(step, files=learner.finish_save())
    except OSError as error:
        print(step, error.errno, flush=True)
        storage.abandon_checkpoint(step)
        assert not is_made
    else:
        assert is_made
"""


def test_a_rank_that_cannot_write_its_share_and_one_that_dies_over_it(tmp_path):
    """A real learner, through the fault points: the second share meets a full disk, the fourth the end."""
    from tests.learner_toys import learner_config, learner_rank, parameters, toy_batch, toy_directory

    toy = toy_directory(tmp_path / "toy")
    faults = {"CONCORD_FAULTS": "learner.write@2=enospc,learner.write@4=kill"}
    result = subprocess.run(
        [sys.executable, "-c", LEARNING, toy, str(tmp_path / "run")],
        cwd=ROOT, env={**os.environ, **faults}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert result.stdout == f"2 {errno.ENOSPC}\n"
    storage = RunStorage(str(tmp_path / "run"))
    torn = list((tmp_path / "run" / "checkpoints").glob("step-3.*.tmp/*"))
    assert [path.name for path in torn] == ["learner-00001-of-00001.safetensors"]
    step, directory = storage.newest_checkpoint()
    assert step == 2
    config = learner_config()
    expected, found = learner_rank(toy, config), learner_rank(toy, config)
    for number in (1, 2, 2):
        batch = toy_batch(toy, config, step=number)
        expected.step(batch.tables, batch.plan)
    found.load_state(directory)
    assert parameters(found).keys() == parameters(expected).keys()
    assert all(value.equal(parameters(expected)[name]) for name, value in parameters(found).items())
    storage.open_for_writing(print)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-1", "step-2"]
