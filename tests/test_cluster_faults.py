"""Real faults in a real run: processes die, freeze and fail at named points, and the run ends as if nothing had been.

Everything is real (Ray, DeepSpeed, signals, disk); only the model is tiny.  Staleness 0, CPU, one seed: a disturbed run
has the same weights and metrics as an undisturbed one, to the bit, times and fault counters apart.
"""

import json
import os
import time

import pyarrow.parquet as pq
import pytest
import torch

from cluster.fleet import FleetError
from cluster.gang import LearnerGang
from cluster.loop import train, train_step
from cluster.pool import RayWorkers
from cluster.recovery import NonFiniteRunError
from cluster.run import Run, Stopped
from cluster.storage import RunStorage
from tests.run_toys import are_equal, assert_each_group_is_trained_once, merged, replayed, tiny_config, weights_of

NUM_STEPS = 4
TIMEOUT_S = 20.0


def _config(directory, data, **sections):
    disturbed = {
        "rollouts": {"samples_per_prompt": 2, "max_rows": 4, "num_workers": 2},
        "reward": {"components": {"share": {"function": "tests.rules:share_of_a", "normalize": "running"}}},
        "learner": {"num_ranks": 2, "zero_stage": 2, "epochs": 1},
        "algorithm": {"kl": {"controller": "adaptive", "coef": 0.01, "target": 0.1, "horizon": 1000}},
        "pipeline": {"timeout_s": 120.0},
        "evaluation": {"prompts": {"path": str(data / "prompts.jsonl")}, "every": 2, "num_prompts": 2},
        "placement": {"rollout_threads": 1, "reward_threads": 1, "learner_threads": 1},
    }
    return tiny_config(directory, data, **merged(disturbed, sections))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    rows = [json.dumps({"prompt": "abcd"[n % 4] * (1 + n // 4), "id": f"p{n}"}) for n in range(10)]
    (directory / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return directory


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    with Run(_config(directory, data)) as run:
        train(run)
    return directory


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Return a function that plants faults into the processes that start from now on; it returns how many fired."""

    def plant(*faults):
        markers = tmp_path / "fired"
        markers.mkdir()
        monkeypatch.setenv("CONCORD_FAULTS", ",".join(faults))
        monkeypatch.setenv("CONCORD_FAULTS_DIR", str(markers))
        return lambda: len(os.listdir(markers))

    return plant


def _faults(directory):
    row = pq.read_table(directory / "metrics.parquet").to_pylist()[-1]
    return {name.removeprefix("faults_"): value for name, value in row.items() if name.startswith("faults_")}


@pytest.mark.slow
def test_the_undisturbed_run_meets_no_fault(undisturbed):
    assert all(count == 0 for count in _faults(undisturbed).values()), _faults(undisturbed)


@pytest.mark.slow
def test_three_deaths_in_one_run_change_nothing(undisturbed, data, tmp_path, plant):
    num_fired = plant("rollout.decode@5=kill", "reward.score@3=kill", "learner.after_update[0]@3=kill")
    directory = tmp_path / "run"
    with Run(_config(directory, data)) as run:
        train(run)
    assert num_fired() == 3
    assert are_equal(directory, undisturbed)
    faults = _faults(directory)
    assert faults["num_restarts"] == 2
    assert faults["num_learner_restarts"] == 1
    assert faults["num_replayed_steps"] == 0, "step 3 died, step 2 has a checkpoint"


DEATHS = {
    "a rollout worker mid-generation": "rollout.decode@5=kill",
    "a rollout worker while it fetches weights": "rollout.fetch_weights@2=kill",
    "the reward worker": "reward.score@6=kill",
    "a rank before backward": "learner.before_backward[1]@2=kill",
    "a rank after its update, unacknowledged": "learner.after_update[1]@2=kill",
    "rank 0 after its update, unacknowledged": "learner.after_update[0]@4=kill",
    "a rank while it publishes": "learner.publish[0]@3=kill",
    "a rank while it gathers a checkpoint": "learner.gather[1]@1=kill",
    "a rank while it writes a checkpoint": "learner.write[0]@1=kill",
    "a full disk under a checkpoint": "learner.write[1]@1=enospc",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DEATHS.values(), ids=DEATHS)
def test_one_death_changes_nothing(undisturbed, data, tmp_path, plant, fault):
    num_fired = plant(fault)
    directory = tmp_path / "run"
    with Run(_config(directory, data)) as run:
        train(run)
    assert num_fired() == 1
    assert are_equal(directory, undisturbed)
    assert sum(_faults(directory).values()) > 0, "it was counted"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in DEATHS.values() if "learner.write" not in fault])
def test_one_death_ahead_of_the_learner_loses_nothing(ray_cluster, data, tmp_path, plant, fault):
    """With staleness the order of events decides what is sampled, so a run is compared with a replay of its own log."""
    directory = tmp_path / "run"
    config = _config(directory, data, pipeline={"max_staleness": 2}, evaluation={"prompts": None})
    num_fired = plant(fault)
    with Run(config) as run:
        train(run)
    assert num_fired() == 1
    assert sum(_faults(directory).values()) > 0, "it was counted"
    assert_each_group_is_trained_once(directory, config)
    weights = weights_of(directory)
    again = weights_of(replayed(directory, config, tmp_path / "again"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


HANGS = {
    "a rollout worker that generates": ("rollout.decode@30=stop", RayWorkers, "kill", TIMEOUT_S / 4),
    "a learner rank": ("learner.before_backward[1]@2=stop", LearnerGang, "close", TIMEOUT_S),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "owner", "ends", "deadline_s"), HANGS.values(), ids=HANGS)
def test_a_frozen_process_is_found_within_twice_its_deadline(
    undisturbed, data, tmp_path, plant, monkeypatch, fault, owner, ends, deadline_s
):
    num_fired = plant(fault)
    directory = tmp_path / "run"
    ended = []
    end = getattr(owner, ends)
    monkeypatch.setattr(owner, ends, lambda *arguments: (ended.append(time.time()), end(*arguments))[1])
    pipeline = {"timeout_s": TIMEOUT_S, "heartbeat_s": TIMEOUT_S / 4}
    with Run(_config(directory, data, pipeline=pipeline)) as run:
        train(run)
    assert num_fired() == 1
    assert are_equal(directory, undisturbed)
    (marker,) = (tmp_path / "fired").iterdir()
    found_s = ended[0] - marker.stat().st_mtime
    print(f"frozen process ended after {found_s:.1f} s; deadline {deadline_s:g} s")
    assert 0 < found_s < 2 * deadline_s


@pytest.mark.slow
def test_an_empty_fleet_ends_the_run_soon_and_leaves_the_checkpoint(ray_cluster, data, tmp_path, plant):
    num_fired = plant("rollout.generate@8=kill", "rollout.generate@8=kill")
    directory = tmp_path / "run"
    settings = {"num_steps": 50, "checkpoint_every": 1}
    config = _config(directory, data, pipeline={"max_restarts": 0}, run=settings)
    began = []

    def train_until_the_fleet_is_empty():
        with Run(config) as run:
            run.evaluate_start()
            for step in run.steps():
                began.append(time.monotonic())
                train_step(run, step)

    with pytest.raises(FleetError, match="rollout workers must live"):
        train_until_the_fleet_is_empty()
    print(f"typed exit {time.monotonic() - began[-1]:.1f} s after the last step began")
    assert time.monotonic() - began[-1] < 30
    assert num_fired() == 2
    found = RunStorage(str(directory)).newest_checkpoint()
    assert found is not None
    with Run(config) as run:
        assert run.step == found[0]
        train_step(run, next(run.steps()))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_stopped_after_every_step_and_resumed_equals_the_straight_run(ray_cluster, data, tmp_path, zero_stage):
    """Every second stop is a tidy one that saves, every other a crash whose steps come back from the redo log."""

    def config(name):
        return _config(tmp_path / name, data, learner={"zero_stage": zero_stage}, run={"num_steps": 6})

    with Run(config("straight")) as run:
        train(run)
    for last in range(1, 6):
        try:
            with Run(config("stopped")) as run:
                run.evaluate_start()
                for step in run.steps():
                    train_step(run, step)
                    if step == last and last % 2 == 0:
                        run.stop.requested = True
                    elif step == last:
                        break
        except Stopped:
            assert last % 2 == 0
    with Run(config("stopped")) as run:
        train(run)
    assert are_equal(tmp_path / "stopped", tmp_path / "straight")


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_three_in_a_row_end_the_run(ray_cluster, data, tmp_path):
    reward = {"components": {"share": {"function": "tests.rules:enormous_for_b"}}}
    algorithm = {"whiten_advantages": False}
    config = _config(tmp_path / "run", data, reward=reward, algorithm=algorithm, evaluation={"prompts": None})
    with Run(config) as run:
        train(run)
    rows = pq.read_table(tmp_path / "run" / "metrics.parquet").to_pylist()
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert 0 < len(skipped) < NUM_STEPS
    assert rows[-1]["groups_dropped"] == 4 * len(skipped)
    everywhere = {"components": {"share": {"function": "tests.rules:enormous"}}}
    config = _config(tmp_path / "hopeless", data, reward=everywhere, algorithm=algorithm, evaluation={"prompts": None})
    with pytest.raises(NonFiniteRunError, match="steps 1 to 3"), Run(config) as run:
        train(run)
    assert RunStorage(str(tmp_path / "hopeless")).checkpoints() == []
