"""Ranks as Ray actors: one deadline for all, the first failure ends the wait, and whatever hangs can be ended."""

import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from cluster.config import PlacementConfig
from cluster.placement import PlacementError, Processes, check_gpus
from cluster.pool import unique_name
from cluster.ranks import GangError, GangPlace, Ranks


class Toy:
    def __init__(self, rank):
        self.rank = rank

    def pid(self):
        return os.getpid()

    def answer(self, seconds):
        time.sleep(seconds[self.rank])
        return self.rank

    def fail(self):
        if self.rank == 0:
            time.sleep(60)
        raise OSError(28, "no space left on device")

    def lose_peer(self):
        if self.rank == 0:
            raise RuntimeError("connection closed by peer")
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    def variables(self):
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CONCORD_GROUP_TIMEOUT_S")
        return [os.environ[name] for name in names]


@pytest.fixture(scope="module")
def place(ray_cluster):
    processes = Processes(role="learner", count=2, cpus=0.5, gpus=0.0, threads=1)
    place = GangPlace(processes, ready_timeout_s=60.0)
    yield place
    place.close()


@pytest.fixture
def ranks(place):
    ranks = start(place)
    yield ranks
    ranks.close()


def start(place):
    run = unique_name("toys")
    return Ranks(
        Toy, lambda rank: {"rank": rank}, place, group_timeout_s=7.5, name=lambda rank: f"{run}/learner-{rank}.0"
    )


def gather(ranks, method, *arguments, timeout_s=60.0):
    calls = [getattr(actor, method).remote(*arguments) for actor in ranks.actors]
    return ranks.gather(calls, what=f"testing {method}", timeout_s=timeout_s)


def test_answers_come_in_rank_order_and_ranks_know_their_group(ranks, ray_cluster):
    assert gather(ranks, "answer", [0.5, 0.0]) == [0, 1]
    first, second = gather(ranks, "variables")
    assert (first[0], second[0]) == ("0", "1")
    assert first[1:] == second[1:]
    [node] = ray_cluster.nodes()
    assert (first[1], first[2], first[4]) == ("2", node["NodeManagerAddress"], "7.5")


def test_all_ranks_have_one_deadline_together(ranks):
    gather(ranks, "pid")
    started = time.monotonic()
    with pytest.raises(GangError, match=r"testing answer must finish within 1 s and did not on rank 1; raise pipeline"):
        gather(ranks, "answer", [0.7, 1.7], timeout_s=1.0)
    assert time.monotonic() - started < 1.5, "a deadline for each answer would have let both pass"


def test_the_first_failure_ends_the_wait_and_keeps_its_cause(ranks):
    gather(ranks, "pid")
    started = time.monotonic()
    with pytest.raises(GangError, match=r"testing fail failed: OSError: .*no space left") as caught:
        gather(ranks, "fail")
    assert time.monotonic() - started < 10
    assert isinstance(caught.value.cause, OSError)
    assert caught.value.cause.errno == 28
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.cause.errno) == (str(caught.value), 28)


def test_the_death_of_a_process_explains_what_its_peer_reported(ranks):
    gather(ranks, "pid")
    with pytest.raises(GangError, match="testing lose_peer failed because its process died") as caught:
        gather(ranks, "lose_peer")
    assert caught.value.cause is None


@pytest.mark.slow
def test_a_stopped_rank_is_ended_and_another_gang_takes_its_place(ranks, place):
    pids = gather(ranks, "pid")
    with pytest.raises(GangError, match="did not on rank 1"):
        gather(ranks, "stop", timeout_s=1.0)
    assert psutil.Process(pids[1]).status() == psutil.STATUS_STOPPED
    group, started = place.reserve(), time.monotonic()
    ranks.close()
    assert time.monotonic() - started < 1, "closing waits for nobody"
    other = start(place)
    try:
        assert set(gather(other, "pid")).isdisjoint(pids)
    finally:
        other.close()
    assert place.reserve() is group
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert alive == []


def test_a_place_that_is_gone_is_made_again(place):
    from ray.util.placement_group import remove_placement_group

    group = place.reserve()
    remove_placement_group(group)
    ranks = start(place)
    try:
        assert place.reserve() is not group
        assert len(gather(ranks, "pid")) == 2
    finally:
        ranks.close()


def sizes(*, rollout=(1, 0.0), reward=(1, 0.0), learner=(1, 0)):
    """Return the settings that placing reads; each pair is (processes, GPUs of each)."""
    return SimpleNamespace(
        rollouts=SimpleNamespace(num_workers=rollout[0], tensor_parallel=1),
        reward=SimpleNamespace(num_workers=reward[0]),
        learner=SimpleNamespace(num_ranks=learner[0]),
        placement=PlacementConfig(rollout_gpus=rollout[1], reward_gpus=reward[1], learner_gpus=learner[1]),
    )


def test_gpus_that_all_processes_want_together_must_be_there():
    check_gpus(sizes(), 0.0)
    check_gpus(sizes(rollout=(2, 1.0), reward=(4, 0.25), learner=(1, 1)), 4.0)
    check_gpus(sizes(rollout=(3, 0.1), reward=(1, 0.7)), 1.0)  # 1.0000000000000002 in binary
    with pytest.raises(PlacementError) as caught:
        check_gpus(sizes(rollout=(2, 1.0), reward=(4, 0.25), learner=(2, 1)), 4.0)
    message = "at most the 4 available, got 5 wanted (placement.rollout_gpus 1 x 2, placement.reward_gpus 0.25 x 4, "
    assert f"{message}placement.learner_gpus 1 x 2); lower them" in str(caught.value)


JOINING = """
import sys
from cluster.placement import PlacementError, join_cluster
from tests.test_cluster_ranks import sizes
try:
    print(join_cluster(sizes(learner=(1, 1))))
except PlacementError as error:
    print(error)
"""


def join(**variables):
    """Join as a process of its own that wants a GPU; return what it said and the seconds it took."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", JOINING], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return result.stdout, time.monotonic() - started


@pytest.mark.slow
def test_a_local_cluster_without_gpus_refuses_at_once_and_one_that_was_joined_may_grow(ray_cluster):
    said, seconds = join()
    assert "GPUs of all processes must be at most the 0 available, got 1 wanted (placement.learner_gpus 1 x 1)" in said
    assert seconds < 60
    assert join(RAY_ADDRESS=ray_cluster.get_runtime_context().gcs_address)[0] == "(2, 2)\n"
