"""The RLlib shell drives the same run: configuration by methods, train, save, restore."""

import json
import math

import pyarrow.parquet as pq
import pytest

from cluster.config import ConfigError, RunConfig, load
from cluster.loop import train_step
from cluster.rllib import RLHF, RLHFConfig
from cluster.run import Stopped
from tests.recovery_toys import calm_place

ARCHITECTURE = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 6}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))  # RLlib's log directories
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcd"))
    return (
        RLHFConfig()
        .model({"architecture": ARCHITECTURE, "tokenizer": {"characters": "abcd"}})
        .prompts(path=str(prompts))
        .rollouts(prompts_per_step=4, samples_per_prompt=4, max_new_tokens=6, max_rows=8)
        .reward(components={"share": {"function": "tests.rules:share_of_a"}})
        .learners(backend="local", optimizer={"learning_rate": 3e-3})
        .run(dir=str(tmp_path / "run"), num_steps=3, checkpoint_every=1)
    )


def test_methods_say_what_the_yaml_says(config):
    run_config = config.rollouts(temperature=0.7).section("evaluation", every=5).run_config(default_dir="unused")
    assert run_config.policy.model.architecture == ARCHITECTURE
    assert (run_config.rollouts.temperature, run_config.rollouts.samples_per_prompt) == (0.7, 4)
    assert (run_config.learner.optimizer.learning_rate, run_config.evaluation.every) == (3e-3, 5)
    assert run_config.run.dir.endswith("run")


def test_a_yaml_file_and_methods_after_it():
    path = "examples/randomwalks.yaml"
    config = RLHFConfig().from_yaml(path, ("run.num_steps=7",)).learners(optimizer={"learning_rate": 1e-4})
    assert config.run_config(default_dir="unused").learner.optimizer.learning_rate == 1e-4
    assert config.run_config(default_dir="unused").learner.optimizer.schedule == "linear", "nested settings are merged"
    plain = RLHFConfig().from_yaml(path, ("run.num_steps=7",)).run_config(default_dir="unused")
    assert plain == load(RunConfig, path, ["run.num_steps=7"])


def test_a_wrong_setting_names_its_path(config):
    with pytest.raises(ConfigError, match=r"rollouts.temprature is not a setting; did you mean 'temperature'\?"):
        config.rollouts(temprature=0.5).build_algo()


def test_without_a_directory_the_run_is_in_the_log_directory(config):
    del config.sections["run"]["dir"]
    assert config.run_config(default_dir="/somewhere/run").run.dir == "/somewhere/run"


def test_settings_survive_rllibs_dict(config):
    """Tune hands configurations over as dicts."""
    again = RLHF.get_default_config().update_from_dict(config.to_dict())
    assert again.run_config(default_dir="unused") == config.run_config(default_dir="unused")


def test_tune_is_told_of_every_process_it_must_make_room_for(config):
    request = RLHF.default_resource_request(config.rollouts(num_workers=2))
    assert len(request.bundles) == 3, "two rollout workers and a reward worker; the ranks have a group of their own"


def test_train_is_one_step_of_the_run(config, ray_cluster, tmp_path):
    algorithm = config.run(num_steps=2).build_algo()
    try:
        results = [algorithm.train() for _ in range(2)]
        with pytest.raises(RuntimeError, match=r"at most run\.num_steps times"):
            algorithm.train()
    finally:
        algorithm.stop()
    assert [(result["training_iteration"], result["done"]) for result in results] == [(1, False), (2, True)]
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").drop(["step"]).to_pylist()
    assert [{name: result.get(name) for name in row} for result, row in zip(results, rows, strict=True)] == rows
    assert (tmp_path / "run" / "policy" / "config.json").exists(), "the last step exports the policy"


@pytest.mark.slow
def test_a_restored_algorithm_continues(config, ray_cluster, tmp_path):
    algorithm = config.build_algo()
    try:
        algorithm.train()
        checkpoint = algorithm.save_to_path(str(tmp_path / "checkpoint"))
    finally:
        algorithm.stop()
    restored = RLHF.from_checkpoint(checkpoint)
    try:
        result = restored.train()
    finally:
        restored.stop()
    assert (result["training_iteration"], result["policy_version"]) == (2, 2)
    assert math.isfinite(result["score_mean"])
    assert pq.read_table(tmp_path / "run" / "metrics.parquet")["step"].to_pylist() == [1, 2]


def _on(run):
    """An algorithm as after `setup`, without Ray."""
    algorithm = RLHF.__new__(RLHF)
    algorithm._run, algorithm._steps = run, run.steps()
    return algorithm


def test_cleaning_up_completes_the_checkpoint_under_way(tmp_path):
    with calm_place(tmp_path) as (start, _):
        algorithm = _on(run := start())
        for _ in range(2):
            train_step(run, next(algorithm._steps))
        assert run.storage.newest_checkpoint() is None, "under way"
        algorithm.cleanup()
        algorithm.cleanup()
        assert run.storage.newest_checkpoint()[0] == 2


def test_a_stop_request_saves_the_last_step(tmp_path):
    with calm_place(tmp_path) as (start, said):
        algorithm = _on(run := start())
        train_step(run, next(algorithm._steps))
        run.stop.requested = True
        with pytest.raises(Stopped):
            algorithm.training_step()
        assert run.storage.newest_checkpoint()[0] == 1
        algorithm.cleanup()
    assert sum("stopped after step 1; the same command continues the run" in line for line in said) == 1
