"""Where there is room for more rollout workers, that it is looked for while the run lasts, and what comes of it."""

import threading
from dataclasses import replace

import pytest
from ray.exceptions import RaySystemError

from cluster.bundles import Node
from cluster.config import ConfigError, RunConfig, validate
from cluster.growth import Growth, NodeView, rooms
from cluster.messages import FailureKind, Verb
from cluster.placement import Processes
from tests.dispatcher_toys import LIMITS, World
from tests.run_toys import tiny_config

ON_CPU = Processes(role="rollout", count=2, cpus=1.0, gpus=0.0, threads=2)
ON_GPU = Processes(role="rollout", count=2, cpus=1.0, gpus=1.0, threads=1, labels={"role": "rollout"})


def view(cpus, gpus=0.0, *, used=(0.0, 0.0), **labels):
    total = Node(name="n", cpus=cpus, gpus=gpus, labels=labels)
    return NodeView(total=total, free=replace(total, cpus=cpus - used[0], gpus=gpus - used[1]))


def test_room_is_counted_in_cores_that_a_worker_keeps_busy():
    nodes = {"a": view(4), "b": view(5), "c": view(1), "d": view(8, used=(3.0, 0.0)), "e": view(64)}
    assert rooms(ON_CPU, nodes, frozenset({"e"})) == {"a": 2, "b": 2, "d": 2}


def test_workers_with_gpus_go_where_their_labels_and_whole_gpus_are():
    nodes = {
        "a": view(16, 8, role="rollout"),
        "b": view(16, 8, role="learner"),
        "c": view(2, 8, role="rollout"),
        "d": view(16, 8, used=(0.0, 6.5), role="rollout"),
    }
    assert rooms(ON_GPU, nodes, frozenset()) == {"a": 8, "c": 2, "d": 1}


def test_nodes_that_are_used_when_the_run_begins_are_no_room():
    """Their cores are shared out; one that joins, comes back under another id or was idle is room."""
    nodes, told, seen = {"head": view(8, used=(1.0, 0.0)), "idle": view(2)}, [], threading.Event()

    def look():
        if len(told) == 2:
            raise RaySystemError("the control store is away")
        return dict(nodes)

    def grow(names, count):
        told.append((names, count))
        nodes["new"] = view(4)
        seen.set()

    growth = Growth(ON_CPU, look, grow, every_s=0.001)
    try:
        assert seen.wait(5.0)
        while len(told) < 2:
            seen.wait(0.001)
    finally:
        growth.close()
    assert told[:2] == [(["idle"], 1), (["idle", "new"], 3)]


def test_the_most_is_at_least_what_the_run_begins_with(tmp_path):
    raw = tiny_config(tmp_path / "run", tmp_path).model_dump(mode="json")
    raw["rollouts"] |= {"num_workers": 3, "max_workers": 2}
    with pytest.raises(ConfigError, match="max_workers must be at least num_workers = 3, got 2"):
        validate(RunConfig, raw, where="test")


def test_a_fleet_grows_where_there_is_room_and_shrinks_with_the_node():
    world = World(rollouts=1, max_rollouts=2, capacity=1)
    round_ = world.begin("a", "b", "c")
    assert world.started == ["rollout-0.0", "reward-0.0"], "a slot without room has no process"
    world.dispatcher.grow(5, world.now)
    world.tick(1.0)
    assert world.started[2:] == ["rollout-1.0"], "as many as there are slots"
    world.answer_all(Verb.READY, Verb.LOAD)
    (second,) = world.calls(Verb.GENERATE, "rollout-1.0")
    world.fail(second, FailureKind.DIED, "its node is gone")
    assert (world.dispatcher.take_notes(), world.started[3:]) == (
        ["rollout-1.0: its node is gone; another takes its place when there is room"], [],
    )  # fmt: skip
    world.dispatcher.grow(1, world.now)
    world.tick(2.0)
    assert world.started[3:] == ["rollout-1.1"]
    world.answer_all(Verb.READY, Verb.LOAD, Verb.GENERATE, Verb.SCORE)
    assert sorted(round_.finished) == ["a", "b", "c"]
    assert world.dispatcher.error is None


@pytest.mark.parametrize("too_late", [True, False])
def test_a_node_that_cannot_start_a_worker_does_not_end_the_run(too_late):
    """Where the run begins it would: there none of its kind could start."""
    patient = replace(LIMITS, timeout_s=1000.0, heartbeat_s=1000.0)
    world = World(rollouts=1, max_rollouts=2, max_restarts=1, limits=patient)
    world.begin("a")
    for life in range(2):
        world.dispatcher.grow(1, world.now)
        world.tick(world.now + 1.0)
        if too_late:
            world.tick(world.now + 31.0)
        else:
            world.fail(world.calls(Verb.READY, f"rollout-1.{life}")[0], FailureKind.DATA, "no such model here")
    assert world.dispatcher.error is None
    assert world.dispatcher.take_notes()[-1].endswith("its place is given up after 2 failures in a row")
    world.dispatcher.grow(1, world.now)
    world.tick(world.now + 1.0)
    assert "rollout-1.2" not in world.started
    assert world.dispatcher.counters["num_given_up"] == 1
