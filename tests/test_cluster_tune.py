"""Sweeps with Ray Tune: what a trial asks for, several at a time, one that fails alone, one that is continued."""

import os
import time

import pytest
from ray import tune

from cluster.placement import plan_placement, trial_cores
from cluster.rllib import RLHF
from tests.rllib_toys import toy_config

GPUS = {"learner_gpus": 1, "rollout_gpus": 1.0}


def test_a_trial_asks_for_every_process_the_ranks_first(tmp_path):
    config = toy_config(tmp_path).rollouts(num_workers=2).learners(backend="zero", num_ranks=2)
    bundles = RLHF.default_resource_request(config.section("placement", learner_gpus=1, rollout_gpus=0.5)).bundles
    assert [bundle.get("GPU", 0) for bundle in bundles] == [1, 1, 0.5, 0.5, 0], "ranks, rollout workers, judge"


def test_guests_share_the_ranks_bundles(tmp_path):
    config = toy_config(tmp_path).section("placement", colocated=True, **GPUS)
    bundles = RLHF.default_resource_request(config).bundles
    assert [bundle.get("GPU", 0) for bundle in bundles] == [1, 0], "a rank with its rollout worker, and the judge"
    assert bundles[0]["CPU"] == 2 * bundles[1]["CPU"]


def test_labels_select_the_nodes_of_the_bundles(tmp_path):
    config = toy_config(tmp_path).section("placement", by_role=True)
    group = RLHF.default_resource_request(config)._bound.arguments
    assert group["bundle_label_selector"] == [{"role": "learner"}, {"role": "rollout"}, {"role": "reward"}]


@pytest.mark.parametrize(("cores", "at_a_time", "threads"), [(1, 2, 1), (2, 1, 2)])
def test_cores_say_how_many_trials_there_are_at_a_time_on_two_cores(tmp_path, cores, at_a_time, threads):
    config = toy_config(tmp_path).section("placement", cores=cores)
    bundles = RLHF.default_resource_request(config).bundles
    assert int(2 / sum(bundle["CPU"] for bundle in bundles)) == at_a_time
    assert plan_placement(config.run_config(default_dir="unused"), cores=2).learner.threads == threads


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("workers", [1, 2, 5, 33, 98])
def test_a_trial_plans_what_was_asked_for(tmp_path, cores, workers):
    """It knows only its bundles; their processes must come out the same, with no more threads than they stand for."""
    config = toy_config(tmp_path).rollouts(num_workers=workers).run_config(default_dir="unused")
    asked = plan_placement(config, cores=cores)
    own = trial_cores([group.resources for group, _ in asked.trial_bundles()])
    inside = plan_placement(config, cores=own)
    assert [processes.cpus for processes in inside.all] == [processes.cpus for processes in asked.all]
    assert own <= cores


def test_a_trial_that_is_wrong_is_left_to_fail_alone(tmp_path):
    request = RLHF.default_resource_request(toy_config(tmp_path).learners(optimizer={"learning_rate": -1.0}))
    assert sum(bundle["CPU"] for bundle in request.bundles) < 0.02


def _all_free(ray):
    """Whether all cores are free again, within some seconds."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    return ray.available_resources().get("CPU", 0) == 2


def _tuner(config, sections, directory, **options):
    return tune.Tuner(
        RLHF,
        param_space={**config.to_dict(), "sections": tune.grid_search(sections)},
        run_config=tune.RunConfig(name="sweep", storage_path=str(directory), verbose=0, **options),
    )


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_four_trials_two_at_a_time_of_which_two_fail_alone(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("CONCORD_CACHE", str(tmp_path / "cache"))
    config = toy_config(tmp_path, num_steps=2).section("placement", cores=1).section("pipeline", max_restarts=0)
    rates = [config.copy().learners(optimizer={"learning_rate": rate}).sections for rate in (1e-3, 1e-2, -1.0)]
    dying = config.copy().reward(components={"share": {"function": "tests.rules:end_the_process"}}).sections
    results = _tuner(config, [*rates, dying], tmp_path / "tune").fit()
    good, better, wrong, dead = results
    assert "learner.optimizer.learning_rate must be greater than 0" in str(wrong.error), wrong.error
    assert "reward" in str(dead.error), dead.error
    assert [result.error for result in (good, better)] == [None, None]
    began = [result.metrics["timestamp"] - result.metrics["time_total_s"] for result in (good, better)]
    assert abs(began[0] - began[1]) < max(result.metrics["time_total_s"] for result in (good, better)), "side by side"
    best = results.get_best_result("score_mean", "max")
    assert best.metrics["score_mean"] == max(result.metrics["score_mean"] for result in (good, better))
    assert os.path.isfile(os.path.join(best.path, "policy", "config.json")), "the trial's directory is the run's"
    assert best.metrics["training_iteration"] == 2
    assert best.metrics["done"]
    assert _all_free(ray_cluster)


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_a_stopped_trial_frees_its_places_and_a_restored_sweep_continues_it(ray_cluster, tmp_path):
    config = toy_config(tmp_path, num_steps=3).section("placement", cores=1)
    (stopped,) = _tuner(config, [config.sections], tmp_path, stop={"training_iteration": 1}).fit()
    assert (stopped.error, stopped.metrics["training_iteration"]) == (None, 1)
    assert _all_free(ray_cluster)
    restored = RLHF.from_checkpoint(stopped.checkpoint)
    try:
        result = restored.train()
    finally:
        restored.stop()
    assert (result["training_iteration"], result["policy_version"]) == (2, 2)
