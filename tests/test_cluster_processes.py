"""What each process does or waits for, as the dispatcher and the loop's phases have it."""

import json

import pytest

from cluster.messages import FailureKind, Verb, Weights
from cluster.processes import PROCESSES_FILE, process_figures, read_processes, worker_processes
from cluster.timeline import Phase
from cluster.watch import Watch
from tests.dispatcher_toys import World

V1 = Weights(incarnation=0, version=1)


def seen(world):
    found = worker_processes(world.dispatcher, world.now)
    return {status.name: (status.state, status.does, status.waits_for) for status in found}


def test_workers_from_their_start_to_the_end_of_a_round():
    world = World(rollouts=2, rewards=1, capacity=2)
    assert seen(world)["rollout-0.0"] == ("starting", "", "a place, and its model")
    world.begin("a", "b", "c")
    assert seen(world) == {
        "rollout-0.0": ("up", "generates 2 groups", ""),
        "rollout-1.0": ("up", "generates 1 group", ""),
        "reward-0.0": ("up", "", "rollouts"),
    }
    world.answer(world.calls(Verb.GENERATE, "rollout-1.0")[0])
    assert seen(world)["rollout-1.0"] == ("up", "", "the learner")
    assert seen(world)["reward-0.0"] == ("up", "judges 1 group", "")
    world.dispatcher.publish(V1, "weights", world.now)
    world.collect()
    assert seen(world)["rollout-1.0"] == ("up", "takes on weights 1", "")
    assert seen(world)["rollout-0.0"] == ("up", "generates 2 groups, takes on weights 1", "")


def test_a_worker_that_dies_again_and_again():
    world = World(rollouts=2, max_restarts=2)
    world.begin("a")
    for _ in range(2):
        (call,) = [call for call in world.open.values() if str(call.worker).startswith("rollout-0") and call.lease] or [
            world.calls(Verb.READY)[0]
        ]
        world.fail(call, FailureKind.DIED)
    assert seen(world)["rollout-0.2"] == ("down", "", "its next start, in 0.5 s")


def test_the_age_is_that_of_the_oldest_lease(monkeypatch):
    monkeypatch.setattr("cluster.processes.time.time", lambda: 5000.0 + world.now)
    world = World(rollouts=1, capacity=2)
    world.now = 3.0
    world.begin("a")
    world.now = 4.0
    world.dispatcher.admit("round", {"b": "work b"}, world.ledger, world.now)
    world.collect()
    world.now = 9.0
    (status,) = [status for status in worker_processes(world.dispatcher, 9.0) if status.name == "rollout-0.0"]
    assert (status.since, status.weights) == (5003.0, "0")
    world.answer(world.calls(Verb.GENERATE)[0])
    (status,) = [status for status in worker_processes(world.dispatcher, 9.0) if status.name == "rollout-0.0"]
    assert status.since == 5004.0


def test_figures_of_single_workers():
    world = World(rollouts=2, rewards=1)
    world.begin("a")
    world.dispatcher.ask_stats(0.0)
    world.collect()
    for call in world.calls(Verb.STATS):
        world.answer(call, {"resident_bytes": 2.0**20, "kv_bytes": 7.0})
    world.tick(4.0)
    world.dispatcher.usage.take_metrics(4.0)
    figures = process_figures(world.dispatcher)
    assert figures["process_rollout_0_busy_share"] == 1.0
    assert figures["process_rollout_1_busy_share"] == 0.0
    assert figures["process_rollout_1_kv_bytes"] == 7.0
    assert "process_reward_0_resident_bytes" in figures


def phases(directory):
    return {process.name: process for process in read_processes(str(directory))}


def test_the_driver_s_phases(tmp_path):
    watch = Watch(str(tmp_path), num_ranks=2)
    assert phases(tmp_path)["learner-1.0"].state == "starting"
    with watch.phase(Phase.PUBLISH, 3):
        assert phases(tmp_path)["learner-1.0"].state == "starting", "nobody has heard of them yet"
    with watch.phase(Phase.WAIT, 4):
        assert phases(tmp_path)["learner-1.0"].waits_for == "the batch of step 4"
        assert phases(tmp_path)["driver"].waits_for == "the batch of step 4"
    with watch.phase(Phase.LEARN, 4):
        rank = phases(tmp_path)["learner-0.0"]
        assert (rank.state, rank.does, rank.weights) == ("up", "learns step 4", "3")
        assert phases(tmp_path)["driver"].waits_for == "the learner, which learns step 4"
        watch.learner_lost()
        rank = phases(tmp_path)["learner-0.1"]
        assert (rank.state, rank.does) == ("starting", "")
    with watch.phase(Phase.WAIT, 5):
        with watch.phase(Phase.PUBLISH, 4):
            assert phases(tmp_path)["learner-0.1"].does == "sends weights 4"
        assert phases(tmp_path)["learner-0.1"].waits_for == "the batch of step 5"
    with watch.phase(Phase.EVALUATE, 4):
        rank = phases(tmp_path)["learner-0.1"]
        assert (rank.state, rank.waits_for, rank.weights) == ("up", "the evaluation of weights 4", "4")


@pytest.mark.parametrize("content", ["", "{}", '{"processes": [{"nonsense": 1}]}', "[]"])
def test_what_cannot_be_read_is_no_view(tmp_path, content):
    assert read_processes(str(tmp_path)) is None
    (tmp_path / PROCESSES_FILE).write_text(content)
    assert read_processes(str(tmp_path)) is None


def test_a_disk_that_refuses_disturbs_nobody(tmp_path):
    watch = Watch(str(tmp_path / "gone"), num_ranks=1)
    with watch.phase(Phase.LEARN, 1):
        pass
    watch = Watch(str(tmp_path), num_ranks=1)
    watch.workers([])
    assert json.loads((tmp_path / PROCESSES_FILE).read_text())["processes"][0]["name"] == "driver"
