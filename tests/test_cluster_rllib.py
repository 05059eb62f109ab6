"""The RLlib shell drives the same run: configuration by methods, train, save, restore."""

import json
import math

import pyarrow.parquet as pq
import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.tune.utils.serialization import TuneFunctionDecoder, TuneFunctionEncoder

from cluster.config import ConfigError, RunConfig, load
from cluster.loop import train_step
from cluster.rllib import RLHF, RLHFConfig
from cluster.run import Stopped
from tests.recovery_toys import calm_place
from tests.rllib_toys import ARCHITECTURE, toy_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path))  # RLlib's log directories
    return toy_config(tmp_path, dir=str(tmp_path / "run"))


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
    config.callbacks(_Notes)
    kept = json.loads(
        json.dumps(config.to_dict(), cls=TuneFunctionEncoder), cls=TuneFunctionDecoder, allow_cloudpickle=True
    )
    for settings in (config.to_dict(), kept):  # as it starts a trial, and as it restores one
        again = RLHF.get_default_config().update_from_dict(settings)
        assert again.run_config(default_dir="unused") == config.run_config(default_dir="unused")
        again.validate()


class _Notes(RLlibCallback):
    def on_algorithm_init(self, *, algorithm, metrics_logger, **kwargs):
        metrics_logger.log_value("mine", algorithm.iteration + 10.0, reduce="max", window=1)

    def on_train_result(self, *, algorithm, metrics_logger, result, **kwargs):
        result["doubled"] = 2 * result["score_mean"]
        metrics_logger.log_value("mine", float(algorithm.iteration), reduce="max", window=1)


class _Episodes(RLlibCallback):
    def on_episode_end(self, **kwargs):
        """A run has no episodes of RLlib's."""


def test_settings_that_a_run_would_ignore_are_refused(config):
    config.environment("CartPole-v1").training(lr=0.1)
    config.num_env_runners = 2
    config.num_worker = 2
    with pytest.raises(ConfigError) as caught:
        config.callbacks(_Episodes).build_algo()
    text = str(caught.value)
    assert "num_env_runners must be left at 0, got 2: a run has no use of RLlib's own; use rollouts(num_workers" in text
    assert 'learners(optimizer={"learning_rate": ...})' in text
    assert "env must be left at None, got 'CartPole-v1'" in text
    assert "num_worker is neither a setting of RLlib nor a section" in text
    assert "_Episodes must have no on_episode_end, which a run never calls" in text
    assert len(text.splitlines()) == 5


def test_methods_of_rllibs_own_policies_say_what_to_use():
    with pytest.raises(NotImplementedError, match=r"get_policy must not be called, .* the policy is in <run"):
        RLHF.__new__(RLHF).get_policy()
    with pytest.raises(NotImplementedError, match=r"use RLHF\.from_checkpoint"):
        RLHF.from_state({})


def test_train_is_one_step_of_the_run(config, ray_cluster, tmp_path):
    held_out = {"path": str(tmp_path / "prompts.jsonl")}
    config = config.section("evaluation", prompts=held_out, every=9, num_prompts=2, samples_per_prompt=2)
    algorithm = config.run(num_steps=2).callbacks(_Notes).build_algo()
    try:
        results = [algorithm.train() for _ in range(2)]
        assert algorithm.evaluate()["eval_score_mean"] == results[1]["eval_score_mean"], "the same weights and seeds"
        assert repr(algorithm) == "RLHF(run)"
        with pytest.raises(RuntimeError, match=r"at most run\.num_steps times"):
            algorithm.train()
    finally:
        algorithm.stop()
    with pytest.raises(RuntimeError, match=r"must not be used after stop\(\)"):
        algorithm.evaluate()
    assert [(result["training_iteration"], result["done"]) for result in results] == [(1, False), (2, True)]
    assert [(result["mine"], result["doubled"]) for result in results] == [
        (value, 2 * result["score_mean"]) for value, result in zip((10.0, 1.0), results, strict=True)
    ], "what callbacks log, and what they add to a result"
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").drop(["step"]).to_pylist()[1:]  # not the evaluated start
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
