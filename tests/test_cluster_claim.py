import fcntl
import os
import threading

import pytest

from cluster import lock as lock_module
from cluster.claim import OPERATIONAL, _flat, claim, learning_changes
from cluster.config import ConfigError
from cluster.storage import RunStorage
from tests.run_toys import minimal_config


def _config(directory, **sections):
    return minimal_config(**{"run": {"dir": str(directory)}} | sections)


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path):
    storage = RunStorage(str(tmp_path))
    lock = claim(storage, _config(tmp_path))
    with pytest.raises(ConfigError, match=r"must belong to one process, and process \d+ is writing to it"):
        claim(storage, _config(tmp_path))
    lock.close()
    claim(storage, _config(tmp_path)).close()


def test_until_the_first_row_any_configuration_may_replace_another(tmp_path):
    storage = RunStorage(str(tmp_path))
    claim(storage, _config(tmp_path)).close()
    claim(storage, _config(tmp_path, run={"dir": str(tmp_path), "num_steps": 9})).close()
    assert "num_steps: 9" in storage.read_text("config.yaml")


def test_a_begun_run_goes_on_with_other_resources_but_not_with_other_learning(tmp_path):
    storage = RunStorage(str(tmp_path))
    claim(storage, _config(tmp_path)).close()
    storage.write_text('{"step": 0}\n', "metrics.jsonl")
    claim(storage, _config(tmp_path, learner={"num_ranks": 2, "zero_stage": 3}, pipeline={"timeout_s": 9.0})).close()
    assert "zero_stage: 3" in storage.read_text("config.yaml")
    with pytest.raises(ConfigError, match=r"another configuration \(algorithm\.clip_range 0\.2 -> 0\.3\)"):
        claim(storage, _config(tmp_path, algorithm={"clip_range": 0.3}))
    claim(storage, _config(tmp_path)).close()  # a refused claim leaves no lock


def test_the_holder_is_the_process_that_has_the_directory(tmp_path):
    storage = RunStorage(str(tmp_path))
    assert storage.holder() is None
    lock = claim(storage, _config(tmp_path))
    assert storage.holder() == str(os.getpid())
    lock.close()
    assert storage.holder() is None, "also where the file is still there"


def test_asking_for_the_holder_does_not_refuse_a_run_that_starts(tmp_path):
    storage = RunStorage(str(tmp_path))
    claim(storage, _config(tmp_path)).close()
    with open(tmp_path / ".lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        release = threading.Timer(0.08, lambda: fcntl.flock(asking, fcntl.LOCK_UN))
        release.start()
        try:
            claim(storage, _config(tmp_path)).close()
        finally:
            release.join()


def test_a_claim_that_tries_once_is_caught(tmp_path, monkeypatch):
    """Planted bug: the run is refused because somebody looked."""
    monkeypatch.setattr(lock_module, "_NUM_TRIES", 1)
    with pytest.raises(ConfigError, match="must belong to one process"):
        test_asking_for_the_holder_does_not_refuse_a_run_that_starts(tmp_path)


def test_operational_settings_exist_and_name_no_learning():
    known = set(_flat(_config("runs/x").model_dump(mode="json")))
    assert known >= OPERATIONAL
    assert not [name for name in OPERATIONAL if name.startswith(("algorithm.", "policy.", "prompts."))]


@pytest.mark.parametrize("name", ["heartbeat_s", "max_restarts", "max_retries", "max_quarantined"])
def test_patience_is_operational(tmp_path, name):
    before, now = _config(tmp_path), _config(tmp_path, pipeline={name: 7})
    assert learning_changes(before, now) == []
    assert learning_changes(before, _config(tmp_path, algorithm={"clip_range": 0.3})) == [
        "algorithm.clip_range 0.2 -> 0.3"
    ]
