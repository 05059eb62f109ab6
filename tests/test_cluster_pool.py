import asyncio
import logging
import os
import queue
import signal
import sys
import time
from dataclasses import dataclass

import pyarrow as pa
import pytest
import ray
import torch
from ray import cloudpickle, exceptions
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from actors import faults
from actors.rollout_worker import RolloutError
from actors.schema import from_stream
from cluster.messages import Call, Failure, FailureKind, Lease, Role, Verb, Weights, WorkerId
from cluster.placement import Processes
from cluster.pool import RayWorkers, failure, unique_name
from reward.errors import RewardError

TIMEOUT_S = 30


# The stubs travel by value and import late: a process that need not import torch starts in half a second.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class StubRollouts:
    """A rollout worker that does what its prompt says."""

    def __init__(self, mood):
        if mood == "sick":
            raise ValueError("mood must be well, got 'sick'\n  input: sick\ncure it")
        self.version = -1

    async def ping(self):
        if self.version == "hanging":
            from actors.rollout_worker import RolloutError

            raise RolloutError("the engine must take a turn")
        return os.getpid()

    async def update_weights(self, publication):
        if publication == "lost":
            from actors.rollout_worker import RolloutError

            raise RolloutError("version 3 could not be fetched")
        self.version = publication
        return 0.5

    async def generate(self, stream, order):
        prompt = from_stream(stream)
        match prompt["do"][0].as_py():
            case "sleep":
                await asyncio.sleep(60)
            case "fail":
                from actors.rollout_worker import RolloutError

                raise RolloutError("generation failed\non two lines")
            case "refuse":
                raise ValueError("a prompt must fit")
        return prompt.append_column("order", pa.array([str((*order, self.version))])), {"num_tokens": 7.0}


class StubRewards:
    """A reward worker that counts rows."""

    def ping(self):
        return "ready"

    def score(self, rollouts):
        if rollouts["do"][0].as_py() == "away":
            raise ConnectionError("reward component 'far', prompt 'p7': away")
        if rollouts["do"][0].as_py() == "unjudgeable":
            from reward.errors import RewardError

            raise RewardError("length", "p7", "a score must be finite, got nan")
        return rollouts, pa.table({"num_rows": [rollouts.num_rows]})


@dataclass(frozen=True)
class Work:
    """A group's work whose order is a plain tuple."""

    what: str

    @property
    def table(self):
        return pa.table({"do": [self.what]})

    def lease(self, lease_id, incarnation):
        return lease_id, incarnation


class Bench:
    """RayWorkers, and the answers that come out of them."""

    def __init__(self, mood="well"):
        processes = Processes(role="rollout", count=1, cpus=0.1, gpus=0, threads=1)
        self.workers = RayWorkers(
            {
                Role.ROLLOUT: (StubRollouts, {"mood": mood}, processes),
                Role.REWARD: (StubRewards, {}, processes),
            },
            run=unique_name("bench"),
        )
        self.answers = queue.Queue()
        self.num_calls = 0

    def start(self, role=Role.ROLLOUT, life=0):
        worker = WorkerId(role=role, slot=0, life=life)
        self.workers.start(worker)
        return worker

    def send(self, worker, verb, payload=None, lease_id=0):
        lease = Lease(lease_id=lease_id, group_id="0/p", worker=worker, weights=Weights(incarnation=2, version=5))
        self.num_calls += 1
        call = Call(call_id=self.num_calls, worker=worker, verb=verb, payload=payload, lease=lease)
        self.workers.call(call, lambda *answer: self.answers.put(answer))
        return self.num_calls

    def take(self):
        return self.answers.get(timeout=TIMEOUT_S)

    def ask(self, *call, **options):
        call_id = self.send(*call, **options)
        answered, value = self.take()
        assert answered == call_id
        return value


@pytest.fixture
def make_bench(ray_cluster):
    benches = []

    def make(**options):
        benches.append(Bench(**options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.workers.close()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def seconds_until(condition):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < TIMEOUT_S
        time.sleep(0.01)
    return time.monotonic() - started


def test_a_group_goes_from_worker_to_worker_as_a_reference(make_bench, ray_cluster):
    bench = make_bench()
    rollout, reward = bench.start(), bench.start(Role.REWARD)
    assert bench.ask(reward, Verb.READY) == "ready"
    assert bench.ask(rollout, Verb.LOAD, 5) == 0.5
    rollouts, numbers = bench.ask(rollout, Verb.GENERATE, Work("well"), lease_id=9)
    assert isinstance(rollouts, ray_cluster.ObjectRef)
    assert numbers == {"num_tokens": 7.0}
    scored, samples = bench.ask(reward, Verb.SCORE, (rollouts, numbers))
    assert isinstance(scored, ray_cluster.ObjectRef)
    assert samples.to_pylist() == [{"num_rows": 1}]
    # lease 9 of incarnation 2, generated with version 5
    assert ray_cluster.get(scored).to_pylist() == [{"do": "well", "order": "(9, 2, 5)"}]


def test_what_a_worker_raises_is_a_failure_and_the_worker_goes_on(make_bench, caplog):
    logging.getLogger("ray").addHandler(caplog.handler)
    bench = make_bench()
    rollout, reward = bench.start(), bench.start(Role.REWARD)
    asked = [
        bench.ask(rollout, Verb.LOAD, "lost"),
        bench.ask(rollout, Verb.GENERATE, Work("fail")),
        bench.ask(rollout, Verb.GENERATE, Work("refuse")),
    ]
    table, numbers = bench.ask(rollout, Verb.GENERATE, Work("unjudgeable"))
    asked.append(bench.ask(reward, Verb.SCORE, (table, numbers)))
    asked.append(bench.ask(reward, Verb.SCORE, bench.ask(rollout, Verb.GENERATE, Work("away"))))
    judge = "reward component 'length', prompt 'p7'"
    assert asked == [
        Failure(kind=FailureKind.INFRA, text="RolloutError: version 3 could not be fetched"),
        Failure(kind=FailureKind.INFRA, text="RolloutError: generation failed on two lines"),
        Failure(kind=FailureKind.DATA, text="ValueError: a prompt must fit"),
        Failure(kind=FailureKind.DATA, text=f"RewardError: {judge}: a score must be finite, got nan"),
        Failure(kind=FailureKind.INFRA, text="ConnectionError: reward component 'far', prompt 'p7': away"),
    ]
    assert isinstance(bench.ask(rollout, Verb.PING), int)
    assert bench.ask(rollout, Verb.LOAD, "hanging") == 0.5
    hanging = Failure(kind=FailureKind.INFRA, text="RolloutError: the engine must take a turn")
    assert bench.ask(rollout, Verb.PING) == hanging
    logging.getLogger("ray").removeHandler(caplog.handler)
    assert "Unhandled error" not in caplog.text  # the dispatcher says what failed, Ray need not


def test_what_a_constructor_raises_is_the_answer_to_ready(make_bench):
    bench = make_bench(mood="sick")
    answer = bench.ask(bench.start(), Verb.READY)
    assert answer == Failure(
        kind=FailureKind.DATA, text="ValueError: mood must be well, got 'sick' input: sick cure it"
    )


def test_killing_ends_the_process_and_its_calls_at_once_and_the_next_life_starts(make_bench):
    bench = make_bench()
    worker = bench.start()
    pid = bench.ask(worker, Verb.READY)
    in_flight = [bench.send(worker, Verb.GENERATE, Work("sleep")) for _ in range(2)]
    started = time.monotonic()
    bench.workers.kill(worker)
    assert time.monotonic() - started < 0.2
    answers = dict(bench.take() for _ in in_flight)
    assert sorted(answers) == in_flight
    assert {answer.kind for answer in answers.values()} == {FailureKind.DIED}
    assert {answer.text for answer in answers.values()} == {"The actor is dead because it was killed by `ray.kill`."}
    assert seconds_until(lambda: not is_running(pid)) < 2
    bench.workers.kill(worker)  # once more is no error
    assert bench.ask(bench.start(life=1), Verb.READY) != pid


def test_a_process_that_dies_fails_its_calls_at_once_and_all_later_ones(make_bench):
    bench = make_bench()
    worker = bench.start()
    pid = bench.ask(worker, Verb.READY)
    bench.send(worker, Verb.GENERATE, Work("sleep"))
    time.sleep(0.2)
    started = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert bench.take()[1].kind is FailureKind.DIED
    assert time.monotonic() - started < 2
    answer = bench.ask(worker, Verb.PING)
    assert answer.kind is FailureKind.DIED
    assert "worker process has died" in answer.text
    assert "Some common causes" not in answer.text


def test_a_stopped_process_stays_silent_until_it_is_killed(make_bench):
    bench = make_bench()
    worker = bench.start()
    pid = bench.ask(worker, Verb.READY)
    os.kill(pid, signal.SIGSTOP)
    call_id = bench.send(worker, Verb.PING)
    with pytest.raises(queue.Empty):
        bench.answers.get(timeout=0.5)
    started = time.monotonic()
    bench.workers.kill(worker)
    answered, answer = bench.take()
    assert time.monotonic() - started < 1
    assert (answered, answer.kind) == (call_id, FailureKind.DIED)
    assert seconds_until(lambda: not is_running(pid)) < 8  # Ray sends SIGKILL after 5 s


def test_a_process_can_be_killed_before_it_is_there(make_bench):
    bench = make_bench()
    worker = bench.start()
    bench.send(worker, Verb.READY)
    bench.workers.kill(worker)
    assert bench.take()[1].kind is FailureKind.DIED


def test_two_runs_of_one_name_share_a_cluster_and_closing_one_leaves_the_other(make_bench):
    first, second = make_bench(), make_bench()
    pids = [bench.ask(bench.start(), Verb.READY) for bench in (first, second)]
    first.workers.close()
    assert seconds_until(lambda: not is_running(pids[0])) < 2
    assert second.ask(WorkerId(role=Role.ROLLOUT, slot=0, life=0), Verb.PING) == pids[1]


def away(*arguments, **options):
    raise exceptions.RpcError("the control store does not answer")


REFUSED = Failure(kind=FailureKind.DIED, text="Ray refused: RpcError: the control store does not answer")


def test_what_ray_refuses_to_start_or_call_is_answered_as_gone(make_bench, monkeypatch):
    bench = make_bench()
    with monkeypatch.context() as patch:
        patch.setattr("ray.actor.ActorClass._remote", away)
        worker = bench.start()
        assert bench.ask(worker, Verb.READY) == REFUSED
        bench.workers.kill(worker)
    worker = bench.start(life=1)
    pid = bench.ask(worker, Verb.READY)
    with monkeypatch.context() as patch:
        patch.setattr("ray.actor.ActorMethod._remote", away)
        assert bench.ask(worker, Verb.PING) == REFUSED
        assert bench.ask(worker, Verb.GENERATE, Work("well")) == REFUSED
    assert bench.ask(worker, Verb.PING) == pid


def test_closing_goes_on_after_a_kill_that_ray_refuses(make_bench, monkeypatch, caplog):
    bench = make_bench()
    pids = [bench.ask(bench.start(life=life), Verb.READY) for life in range(2)]
    kill, killed = ray.kill, []

    def refuse_first(actor):
        killed.append(actor)
        return away() if len(killed) == 1 else kill(actor)

    monkeypatch.setattr(ray, "kill", refuse_first)
    bench.workers.close()
    assert len(killed) == 2
    assert "rollout-0.0 could not be killed: RpcError: the control store" in caplog.text
    killed.clear()
    # the first one ends after its last handle
    assert seconds_until(lambda: not any(map(is_running, pids))) < 8


def test_without_ray_nothing_is_started_and_nothing_raises(make_bench, monkeypatch):
    bench = make_bench()
    worker = bench.start()
    bench.ask(worker, Verb.READY)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        gone = Failure(kind=FailureKind.DIED, text="Ray refused: ConnectionError: Ray is shut down")
        assert bench.ask(worker, Verb.PING) == gone
        assert bench.ask(bench.start(life=1), Verb.READY) == gone


def test_a_worker_class_is_wrapped_once_for_all_lives(make_bench, monkeypatch):
    bench = make_bench()
    monkeypatch.setattr(ray, "remote", away)
    first, second = (bench.ask(bench.start(life=life), Verb.READY) for life in range(2))
    assert first != second


def raised(cause):
    """Return what Ray hands out for an exception inside a worker."""
    return RayTaskError("generate", f"Traceback ...\n{cause!r}", cause).as_instanceof_cause()


UNAVAILABLE = ActorUnavailableError("the connection broke", b"0" * 16)
LOST = exceptions.ObjectLostError("00" * 28, None, "")
OWNER_DIED = exceptions.OwnerDiedError("00" * 28, None, "")


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (FailureKind.DIED, ActorDiedError()),
        (FailureKind.DIED, UNAVAILABLE),
        (FailureKind.DIED, exceptions.NodeDiedError("gone")),
        (FailureKind.DIED, exceptions.LocalRayletDiedError()),
        (FailureKind.DIED, exceptions.WorkerCrashedError()),
        (FailureKind.DIED, OWNER_DIED),
        (FailureKind.DIED, exceptions.OutOfMemoryError("1 worker was killed")),
        (FailureKind.INFRA, LOST),
        (FailureKind.INFRA, exceptions.ObjectStoreFullError("full")),
        (FailureKind.INFRA, exceptions.OutOfDiskError("full")),
        (FailureKind.INFRA, GetTimeoutError("late")),
        (FailureKind.INFRA, raised(RolloutError("x"))),
        (FailureKind.INFRA, raised(TimeoutError("x"))),
        (FailureKind.INFRA, raised(ConnectionResetError("x"))),
        (FailureKind.INFRA, raised(MemoryError("x"))),
        (FailureKind.INFRA, raised(torch.OutOfMemoryError("x"))),
        (FailureKind.INFRA, raised(exceptions.ObjectStoreFullError("full"))),
        (FailureKind.INFRA, raised(OWNER_DIED)),  # whoever owned it, this worker lives
        (FailureKind.INFRA, raised(ActorDiedError())),  # e.g. a judge's own helper
        (FailureKind.DATA, raised(ValueError("x"))),
        (FailureKind.DATA, raised(RewardError("length", "p", "x"))),
        (FailureKind.DATA, raised(KeyError("x"))),
        (FailureKind.DATA, exceptions.RaySystemError("cannot be unpickled")),
        (FailureKind.DATA, ZeroDivisionError("x")),
        (FailureKind.DATA, raised(ValueError("\x1b[2Jcleared\r\n" + "word " * 1000))),
    ],
)
def test_kinds_of_failures(kind, error):
    found = failure(error)
    assert found.kind is kind
    assert found.text
    assert found.text.isprintable()
    assert len(found.text) <= 600


def test_only_a_learner_on_a_cpu_holds_on_to_freed_memory():
    def environment(role, gpus):
        return Processes(role=role, count=1, cpus=1, gpus=gpus, threads=1).environment

    on_cpu = environment("learner", 0)
    assert {name for name in on_cpu if name.startswith("MALLOC_")} == {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }
    assert on_cpu.items() >= environment("rollout", 0).items()
    for other in (environment("learner", 1), environment("rollout", 0), environment("reward", 0)):
        assert not any(name.startswith("MALLOC_") for name in other)


def test_planned_faults_reach_the_workers_where_the_driver_has_them(monkeypatch):
    processes = Processes(role="rollout", count=1, cpus=1, gpus=0, threads=1)
    for name in faults.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    without = processes.environment
    assert not set(faults.VARIABLES) & set(without)
    monkeypatch.setenv("CONCORD_FAULTS", "rollout.decode@3=kill")
    assert processes.environment == without | {"CONCORD_FAULTS": "rollout.decode@3=kill"}
    monkeypatch.setenv("CONCORD_FAULTS_DIR", "/tmp/fired")
    assert processes.options()["runtime_env"]["env_vars"]["CONCORD_FAULTS_DIR"] == "/tmp/fired"
