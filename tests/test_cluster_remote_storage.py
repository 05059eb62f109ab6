"""A run directory in an object store: what is there is whole, whatever operation is the last that gets through."""

import hashlib
import os
import pickle
import secrets
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pyarrow as pa
import pytest

import cluster.deliveries
from cluster.deliveries import delivered, fetched
from cluster.object_store import ObjectStore, without_credentials
from cluster.ownership import LostError
from cluster.remote_storage import RemoteStorage, open_storage
from cluster.storage import RunStorage, StorageError
from tests.recovery_toys import NUM_STEPS, Script, train
from tests.test_cluster_checkpoints import SHARES, content


class Killed(BaseException):
    """The process ends here."""


class Plan:
    """Counts a process's operations on stores; the n-th fails, with those after it, or is the end of the process."""

    def __init__(self, nth=0, how=""):
        self.operations = []
        self._nth, self._how = nth, how

    def announce(self, operation, shown):
        self.operations.append((operation, shown))
        number = len(self.operations)
        if self._how == "killed" and number >= self._nth > 0:
            raise Killed
        if (self._how == "error once" and number == self._nth) or (self._how == "error" and number >= self._nth):
            raise OSError(5, "the network is away")


class PlannedStore(ObjectStore):
    def __init__(self, url, plan=None):
        super().__init__(url, sleep=lambda seconds: None)
        self.plan = plan or Plan()

    def announce(self, operation, key):
        super().announce(operation, key)
        self.plan.announce(operation, self.shown(key))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def url():
    return f"memory://{secrets.token_hex(8)}/run"


@pytest.fixture
def process(monkeypatch):
    """Start what stands for a process of its own: its storage, with an empty staging directory, and its ranks."""

    def start(url, plan=None, *, storage_class=RemoteStorage, is_writer=True):
        plan = plan or Plan()
        monkeypatch.setattr(cluster.deliveries, "ObjectStore", lambda url: PlannedStore(url, plan))
        storage = storage_class(PlannedStore(str(url), plan))
        if is_writer:
            storage.open_for_writing(lambda text: None)
        return storage

    return start


def attempt(storage, step, keep=2):
    """Make a checkpoint as a run does; return whether it was said to be made."""
    try:
        directory = storage.begin_checkpoint(step)
        storage.write_text(content(step)["run.json"].decode(), directory, "run.json")
        for name in SHARES:
            with delivered(directory, has_hashes=True) as local:
                Path(local, name).write_bytes(content(step)[name])
        storage.append_text(f"{step}\n", "metrics.jsonl")
        storage.commit_checkpoint(step, files=SHARES)
        storage.keep_checkpoints(keep)
    except OSError:
        storage.abandon_checkpoint(step)
        return False
    return True


def check(url, *, at_least, made):
    """The next process, on an empty disk: what is there is whole, and the newest not older than allowed."""
    storage = RemoteStorage(PlannedStore(url))
    for step in storage.checkpoints():
        file = (storage.checkpoint(step), "run.json")
        if not storage.exists(*file) or storage.read_text(*file) != "damage":
            assert storage._damage(step) is None, f"checkpoint {step} is neither whole nor absent"
    step, directory = storage.newest_checkpoint()
    assert step == 6 if made else step >= at_least
    found = {path.name: path.read_bytes() for path in Path(fetched(directory)).iterdir()}
    assert found == content(step)
    assert storage.read_text("metrics.jsonl").splitlines()[-1] >= str(step), "the journal is not older than that"


def check_retry(process, url):
    """The process after it clears up, and makes the checkpoint."""
    assert attempt(process(url), 6)
    store = PlannedStore(url)
    assert {key.split("/")[1] for key in store.keys("checkpoints/")} == {"step-4", "step-6"}
    for step in (4, 6):
        attempts = {key.split("/")[2] for key in store.keys(f"checkpoints/step-{step}/")}
        assert len(attempts - {"manifest.json.damaged"}) == 2 or "manifest.json.damaged" in attempts
    assert RemoteStorage(store).newest_checkpoint()[0] == 6


def cut_every_operation(process, tmp_path, before, how, storage_class=RemoteStorage):
    """End a process at its first, second, ... operation until it comes through; return how many there were."""
    start, at_least = tmp_path / "before", 6 if before == "whole" else 4
    origin = process(start.as_uri())
    for step in (2, 4) if before == "absent" else (2, 4, 6):
        attempt(origin, step, keep=3)
    if before == "damaged":
        Path(next(start.glob("checkpoints/step-6/*/run.json"))).write_text("damage")
    for nth in range(1, 200):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(start, run)
        plan, made = Plan(nth, how), False
        with suppress(Killed, OSError):
            made = attempt(process(run.as_uri(), plan, storage_class=storage_class), 6)
        process(run.as_uri(), is_writer=False)
        check(run.as_uri(), at_least=at_least, made=made)
        if how == "error once":
            assert made, "it is tried again"
        if len(plan.operations) < nth:
            assert made
            return nth - 1
        check_retry(process, run.as_uri())
    raise AssertionError("no end of operations")


def test_whole_or_absent_wherever_a_process_ends(process, tmp_path):
    assert cut_every_operation(process, tmp_path, "absent", "killed") >= 15


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "error", "error once"])
@pytest.mark.parametrize("before", ["absent", "damaged", "whole"])
def test_whole_or_absent_wherever_it_is_cut(process, tmp_path, before, how):
    assert cut_every_operation(process, tmp_path, before, how) >= 15


class ManifestFirst(RemoteStorage):
    """Planted bug: the commit marker comes before what it commits."""

    def begin_checkpoint(self, step):
        directory = super().begin_checkpoint(step)
        hashes = {name: hashlib.sha256(text).hexdigest() for name, text in content(step).items()}
        self._store.write(
            f"checkpoints/step-{step}/manifest.json", cluster.remote_storage._manifest_in(directory, hashes)
        )
        return directory

    def commit_checkpoint(self, step, *, files=()):
        self.flush()


class OldOneFirst(RemoteStorage):
    """Planted bug: the checkpoint that is there goes before the new one comes."""

    def commit_checkpoint(self, step, *, files=()):
        self._delete([f"checkpoints/step-{step}/manifest.json"])
        super().commit_checkpoint(step, files=files)


class JournalLast(RemoteStorage):
    """Planted bug: a checkpoint counts before the journal that it continues."""

    def commit_checkpoint(self, step, *, files=()):
        flush, self.flush = self.flush, lambda: None
        super().commit_checkpoint(step, files=files)
        self.flush = flush
        self.flush()


@pytest.mark.parametrize(
    "storage_class", [ManifestFirst, *(pytest.param(bug, marks=pytest.mark.slow) for bug in (OldOneFirst, JournalLast))]
)
def test_the_claims_find_planted_bugs(process, tmp_path, storage_class):
    before = "whole" if storage_class is OldOneFirst else "absent"
    with pytest.raises(AssertionError):
        cut_every_operation(process, tmp_path, before, "killed", storage_class)


def test_the_marker_comes_last_and_goes_first(process, url):
    plan = Plan()
    storage = process(url, plan)
    for step in (2, 4):
        assert attempt(storage, step, keep=1)
    changes = [(what, name.removeprefix(storage.shown() + "/")) for what, name in plan.operations]
    changes = [change for change in changes if change[0] in ("write", "upload", "delete")]
    two, four = "checkpoints/step-2/manifest.json", "checkpoints/step-4/manifest.json"
    committed, doomed = changes.index(("write", four)), changes.index(("delete", two))
    assert committed < doomed
    assert not [name for what, name in changes[committed:] if what != "delete" and name != four]
    deleted = [name for what, name in changes if what == "delete"]
    assert deleted[0] == two
    assert len(deleted) == 1 + len(SHARES) * 2 + 1
    assert ("upload", "metrics.jsonl") in changes[:committed]


def outcome_of(url, process, plan, **options):
    done = train(None, Script(), storage=process(url, plan), **options)
    return done.weights, done.controller


def continued_after_a_cut_at(nth, tmp_path, process):
    """Cut a run at an operation, and continue it on an empty disk."""
    url = (tmp_path / str(nth)).as_uri()
    with pytest.raises(Killed):
        outcome_of(url, process, Plan(nth, "killed"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    return outcome_of(url, process, Plan())


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_that_is_cut_goes_on_with_the_same_bits_on_another_machine(process, tmp_path, stride):
    posix = train(tmp_path / "posix", Script())
    plan = Plan()
    expected = outcome_of((tmp_path / "whole").as_uri(), process, plan)
    assert expected == (posix.weights, posix.controller)
    assert len(expected[0]) == 2 * NUM_STEPS
    cuts = range(1, len(plan.operations) + 1, stride)
    assert all(continued_after_a_cut_at(nth, tmp_path, process) == expected for nth in cuts)
    assert len(plan.operations) > 40


def test_damage_is_said_and_the_checkpoint_before_used(process, url):
    storage = process(url)
    for step in (2, 4):
        attempt(storage, step)
    store = PlannedStore(url)
    store.write(next(key for key in store.keys("checkpoints/step-4/") if key.endswith(SHARES[0])), b"damage")
    reader = process(url, is_writer=False)
    assert reader.newest_checkpoint()[0] == 2
    assert reader.checkpoints() == [2, 4], "who only reads leaves it where it is"
    said, writer = [], process(url)
    writer._say = said.append
    assert writer.newest_checkpoint()[0] == 2
    assert (writer.checkpoints(), writer.damaged_checkpoints()) == ([2], ["step-4"])
    assert len(said) == 1
    assert f"{SHARES[0]} does not match its recorded hash" in said[0]
    assert process(url).newest_checkpoint()[0] == 2
    assert len(store.keys("checkpoints/step-4/")) == 6, "its files are kept for people"


def test_what_a_lost_rank_still_brings_disturbs_nobody(process, url):
    storage = process(url)
    lost = storage.begin_checkpoint(6)
    attempt(storage, 6)
    with delivered(lost, has_hashes=True) as local:
        Path(local, SHARES[0]).write_bytes(b"late")
    step, directory = process(url, is_writer=False).newest_checkpoint()
    assert (step, directory != lost) == (6, True)
    process(url)
    assert not PlannedStore(url).keys(f"checkpoints/step-6/{lost.rpartition('/')[2]}/")


def test_a_share_that_was_not_brought_is_named(process, url):
    storage = process(url)
    storage.begin_checkpoint(6)
    with pytest.raises(StorageError, match=r"lacks \['share'\]; see that all nodes reach the same object store"):
        storage.commit_checkpoint(6, files=["share"])
    assert storage.newest_checkpoint() is None


def test_a_host_gets_an_attempt_once_and_notices_other_bytes(process, url, tmp_path):
    plan = Plan()
    storage = process(url, plan)
    attempt(storage, 2)
    directory = storage.checkpoint(2)
    local = fetched(directory)
    num_operations = len(plan.operations)
    assert fetched(directory) == local
    assert len(plan.operations) == num_operations
    attempt(storage, 4)
    fetched(storage.checkpoint(4))
    assert not os.path.exists(local), "one checkpoint a host"
    store = PlannedStore(url)
    store.write(next(key for key in store.keys("checkpoints/step-2/") if key.endswith("run.json")), b"other")
    with pytest.raises(OSError, match="must have the hash"):
        fetched(directory)


def test_files_are_brought_before_they_count_and_got_when_asked_for(process, url):
    storage, table = process(url), pa.table({"step": [1, 2]})
    storage.write_text("a", "config.yaml")
    storage.write_table(table, "rollouts", "step-1.parquet")
    storage.append_text("one\n", "metrics.jsonl")
    Path(storage.path("tensorboard", "events")).write_text("curve")
    other = process(url, is_writer=False)
    assert other.read_text("config.yaml") == "a"
    assert other.read_table("rollouts", "step-1.parquet").equals(table)
    assert (other.names("rollouts"), other.names("evaluation")) == (["step-1.parquet"], [])
    storage.flush()
    assert other.read_text("metrics.jsonl") == "one\n"
    assert Path(other.path("tensorboard", "events")).read_text() == "curve"
    storage.remove("rollouts", "step-1.parquet")
    assert not process(url).exists("rollouts", "step-1.parquet")
    assert (storage.name, storage.shown("policy")) == ("run", f"{url}/policy")


def test_a_database_is_brought_as_of_one_moment(process, url):
    storage = process(url)
    connection = sqlite3.connect(storage.path("ledger.sqlite"))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (x)")
    storage.flush()
    connection.execute("INSERT INTO t VALUES (1)")
    connection.commit()  # in the log, not in the file
    storage.flush()
    with closing(sqlite3.connect(process(url).path("ledger.sqlite"))) as copy:
        assert copy.execute("SELECT x FROM t").fetchall() == [(1,)]
    assert PlannedStore(url).keys() == ["ledger.sqlite"]
    connection.close()


class Owner:
    """Whose claim is lost from a moment on."""

    def __init__(self, store, *, say):
        self.is_lost = False

    def check(self):
        if self.is_lost:
            raise LostError("another has it")

    def release(self):
        pass


def test_who_lost_the_claim_changes_nothing_more(process, url):
    storage = RemoteStorage(PlannedStore(url), own=Owner)
    storage.lock()
    storage.open_for_writing(lambda text: None)
    attempt(storage, 2)
    before = PlannedStore(url).keys()
    directory = storage.begin_checkpoint(4)
    with delivered(directory, has_hashes=True) as local:
        Path(local, "share").touch()
    storage._owner.is_lost = True
    for change in (
        lambda: storage.commit_checkpoint(4),
        lambda: storage.keep_checkpoints(1) or storage._delete(before),
        lambda: storage.write_text("b", "config.yaml"),
        lambda: storage.remove("metrics.jsonl"),
    ):
        with pytest.raises(LostError):
            change()
    storage.abandon_checkpoint(4)
    storage.close()
    assert [key for key in PlannedStore(url).keys("") if "step-4" not in key] == before
    assert process(url, is_writer=False).checkpoints() == [2]


def test_the_starting_model_is_brought_once_by_who_writes(process, url, tmp_path):
    storage, model_dir = process(url), tmp_path / "cache" / "sft" / "key"
    reader = process(url, is_writer=False)
    assert reader.starting_model() is None
    assert reader.model_for_workers("here") == "here", "who only reads brings nothing"
    with delivered(storage.address("start", "half")) as local:
        Path(local, "config.json").write_text("of a process that died")
    with storage.model_under_way(str(model_dir)) as place, delivered(place, has_hashes=True) as local:
        Path(local, "config.json").write_text("trained elsewhere")
    assert (model_dir / "config.json").read_text() == "trained elsewhere"
    (tmp_path / "other").mkdir()
    sent = process(url).model_for_workers(str(tmp_path / "other"))
    assert not PlannedStore(url).keys("start/half/")
    shutil.rmtree(tmp_path / "cache")
    arrived = pickle.loads(pickle.dumps(sent))
    assert Path(arrived, "config.json").read_text() == "trained elsewhere", "what the run began with stays"
    assert process(url).starting_model() == arrived


def test_what_may_pass_is_tried_again_and_what_is_not_there_is_not(url):
    store, waits, failures = ObjectStore(url, sleep=lambda seconds: waits.append(seconds)), [], [2]

    def announce(operation, key):
        if failures[0]:
            failures[0] -= 1
            raise ConnectionResetError(104, "reset")

    store.announce = announce
    store.write("a", b"x")
    assert (waits, store.read("a")) == ([1.0, 3.0], b"x")
    with pytest.raises(FileNotFoundError):
        store.read("b")
    assert len(waits) == 2
    failures[0] = 9
    with pytest.raises(OSError, match=f"reset.*'{url}/a'"):
        store.read("a")
    assert len(waits) == 5


def test_a_path_is_a_path_and_credentials_stay_out(tmp_path):
    assert type(open_storage(str(tmp_path))) is RunStorage
    assert without_credentials("sftp://me:secret@host:22/runs?key=1") == "sftp://host:22/runs"
    assert without_credentials("s3://bucket/runs/x") == "s3://bucket/runs/x"
    store = PlannedStore(tmp_path.as_uri(), Plan(1, "error"))
    store.url = "sftp://me:secret@host/runs"
    store.plan.announce = lambda operation, shown: (_ for _ in ()).throw(RuntimeError("me:secret refused"))
    with pytest.raises(OSError, match=r"refused.*'sftp://host/runs/a'") as caught:
        store.read("a")
    assert "secret" not in str(caught.value)
