"""The real run, its processes simulated, in an object store; `test_cluster_s3.py` has a real one."""

import json
import secrets
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.claim import claim
from cluster.cli import app
from cluster.config import ConfigError
from cluster.deliveries import OnEachHost, fetched
from cluster.gang import write_share
from cluster.loop import train, train_step
from cluster.metrics import is_of_the_machine, read_journal
from cluster.object_store import ObjectStore
from cluster.ownership import LostError
from cluster.remote_storage import RemoteStorage
from cluster.status import run_status
from learner.state import Share
from tests.recovery_toys import calm_place


class FailingStore(ObjectStore):
    """Refuses what a test names, each time."""

    refused = ""

    def __init__(self, url):
        super().__init__(url, sleep=lambda seconds: None)

    def announce(self, operation, key):
        if self.refused and f"{operation} {key}".startswith(self.refused):
            raise OSError(28, "no space left in the store")


class Sole:
    """The only process there is."""

    def __init__(self, store, **options):
        pass

    def check(self):
        pass

    def release(self):
        pass


@pytest.fixture
def url():
    return f"memory://{secrets.token_hex(8)}/walks"


@pytest.fixture
def place(tmp_path, url, monkeypatch):
    """Start runs, each as on a machine of its own."""
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FailingStore, "refused", "")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with calm_place(tmp_path / "posix") as (start, said):
        monkeypatch.setattr("cluster.session.open_storage", lambda run_dir: RemoteStorage(FailingStore(url), own=Sole))
        monkeypatch.setattr("cluster.run.claim", claim)
        monkeypatch.setattr("cluster.session.prepare_policy", lambda policy, **options: str(tmp_path / "model"))
        yield start, said


def rows_of(storage):
    return [
        {name: value for name, value in row.items() if not is_of_the_machine(name)} for row in read_journal(storage)
    ]


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_on_a_machine_that_has_nothing_of_it(place, url, tmp_path):
    start, _ = place
    with start() as run:
        run.evaluate_start()
        steps = run.steps()
        for _ in range(3):
            train_step(run, next(steps))
        run._finish_checkpoint()
    with start() as run:
        assert run.step == 2
        assert isinstance(run._sent_model, OnEachHost)
        assert open_json(run._model_dir, "config.json") == {}
        train(run)
        assert run.pipeline.counts()["trained"] == 12
    found = RemoteStorage(ObjectStore(url))
    with calm_place(tmp_path / "straight") as (start, _), start() as run:
        train(run)
    assert rows_of(found) == rows_of(run.storage)
    assert found.checkpoints() == [4]
    assert {"config.yaml", "incarnation", "ledger.sqlite", "metrics.jsonl", "metrics.parquet", "summary.json"} <= set(
        found.names()
    )
    assert found.names("rollouts") == [f"step-{step}.parquet" for step in range(1, 5)]
    status = run_status_of(found)
    assert (status.step, status.checkpoint, status.groups.trained, status.is_conserved) == (4, 4, 12, True)
    assert status.directory == url


@pytest.mark.slow
def test_commands_take_the_url(place, url, tmp_path, monkeypatch):
    url = (tmp_path / "store" / "walks").as_uri()
    monkeypatch.setattr("cluster.session.open_storage", lambda run_dir: RemoteStorage(FailingStore(url), own=Sole))
    start, _ = place
    with start() as run:
        train(run)
    status = json.loads(told("status", url, "--json"))
    assert (status["step"], status["checkpoint"], status["directory"]) == (4, 4, url)
    assert "12" in told("ledger", url)
    assert told("report", url).strip() == f"{url}/report.html"
    assert (tmp_path / "store" / "walks" / "report.html").stat().st_size > 10_000
    with pytest.raises(ConfigError, match=f"RUN_DIR must be the directory of a run, and '{url}/no' holds no config"):
        told("status", f"{url}/no")
    with pytest.raises(ConfigError, match="RUN_DIR must be in a store whose package is installed"):
        told("status", "wandb://x")
    with pytest.raises(ConfigError, match="a resume must keep what is learnt"):
        told("resume", url, "run.seed=8")


def told(*arguments):
    done = CliRunner().invoke(app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_a_store_that_takes_no_checkpoint_costs_the_checkpoint(place, url, monkeypatch):
    start, said = place
    monkeypatch.setattr(FailingStore, "refused", "write checkpoints/step-2/manifest.json")
    with start() as run:
        train(run)
        assert run._num_failed_checkpoints == 1
    assert any("the checkpoint of step 2 could not be written, the run goes on" in line for line in said)
    found = RemoteStorage(ObjectStore(url))
    assert found.checkpoints() == [4]
    assert not [key for key in ObjectStore(url).keys("checkpoints/") if "step-2" in key], "nothing is left of it"


def test_what_grows_is_brought_again_later(place, url, monkeypatch):
    start, said = place
    monkeypatch.setattr(FailingStore, "refused", "upload metrics.jsonl")
    monkeypatch.setattr("cluster.remote_storage._FLUSH_S", -1.0)
    monkeypatch.setattr("cluster.remote_storage._FLUSH_SHARE", float("inf"))
    with start() as run:
        steps = run.steps()
        train_step(run, next(steps))
        assert run.storage.num_failed_flushes == 1
        monkeypatch.setattr(FailingStore, "refused", "")
        row = train_step(run, next(steps))
        assert row["faults_num_failed_flushes"] == 1
    assert len(read_journal(RemoteStorage(ObjectStore(url)))) == 2
    assert any("could not be brought to memory://" in line for line in said)


def test_rows_that_are_not_in_the_store_are_not_learnt_from(place, url, monkeypatch):
    start, _ = place
    with start() as run:
        steps = run.steps()
        train_step(run, next(steps))
        monkeypatch.setattr(FailingStore, "refused", "write rollouts/step-2.parquet")
        with pytest.raises(OSError, match="no space left in the store"):
            train_step(run, next(steps))
        assert run.learner.step_done == 1


class Lost(Sole):
    def check(self):
        raise LostError("another has it")


def test_a_run_that_lost_its_claim_ends_and_changes_nothing(place, url):
    start, _ = place

    def lose():
        with start() as run:
            steps = run.steps()
            for _ in range(2):
                train_step(run, next(steps))
            run._finish_checkpoint()
            keys.extend(ObjectStore(url).keys())
            run.storage._owner = Lost(run.storage)
            train_step(run, next(steps))

    keys = []
    with pytest.raises(LostError):
        lose()
    assert ObjectStore(url).keys() == keys


def open_json(directory, name):
    with open(f"{directory}/{name}") as file:
        return json.load(file)


def run_status_of(storage):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.status.open_storage", lambda run_dir: storage)
        return run_status("", now=0.0)


def test_ranks_bring_the_very_files_that_they_write_on_a_disk(place, url, tmp_path):
    import torch

    shares = [
        Share(rank=rank, num_ranks=2, tensors={f"policy/w{rank}/param": torch.randn(5)}, num_updates={"policy": 3})
        for rank in range(2)
    ]
    (tmp_path / "disk").mkdir()
    storage = RemoteStorage(FailingStore(tmp_path.as_uri() + "/store"), own=Sole)
    directory = storage.begin_checkpoint(2)
    files = []
    for share in shares:
        files += write_share(share, directory)
        write_share(share, str(tmp_path / "disk"))
    storage.commit_checkpoint(2, files=files)
    copy = fetched(storage.newest_checkpoint()[1])
    names = sorted(path.name for path in (tmp_path / "disk").iterdir())
    assert names == sorted(files) == sorted(path.name for path in Path(copy).iterdir())
    assert all((tmp_path / "disk" / name).read_bytes() == Path(copy, name).read_bytes() for name in names)
