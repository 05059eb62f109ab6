import pytest

from cluster.claim import claim
from cluster.config import ConfigError, RunConfig, validate
from cluster.storage import RunStorage


def _config(directory, **sections):
    raw = {
        "run": {"dir": str(directory), "num_steps": 2},
        "policy": {"model": "owner/model"},
        "prompts": {"path": "prompts.jsonl"},
        "reward": {"components": {"length": {"function": "rules:length"}}},
    }
    for name, section in sections.items():
        raw[name] = raw.get(name, {}) | section
    return validate(RunConfig, raw, where="test")


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
