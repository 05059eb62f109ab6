"""Rollout and reward workers of a simulated world: they die, hang, dawdle and answer twice, late or never."""

from dataclasses import dataclass, field
from typing import Any

from actors.rollout_worker import Lease
from cluster.messages import Call, Failure, FailureKind, Reply, Verb, WorkerId
from tests.simulated_tables import judged, rollouts_of
from tests.simulated_truth import Held, Truth
from tests.simulated_world import World

_DIED = Failure(kind=FailureKind.DIED, text="its process died (simulated)")


@dataclass(slots=True, kw_only=True)
class _Process:
    """One worker process."""

    is_alive: bool = True
    is_hung: bool = False
    holds: Held | None = None
    """The weights it samples from."""
    calls: dict[int, tuple[Call, Reply]] = field(default_factory=dict)
    """Unanswered calls; a death answers them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """A call as the process took it on."""

    call: Call
    process: _Process
    holds: Held | None
    """The weights at that moment."""
    lease: Lease | None
    """The order for a group that is to be generated."""


def _order(call: Call) -> Lease | None:
    if call.verb is not Verb.GENERATE or call.lease is None:
        return None
    order: Lease = call.payload.lease(call.lease.lease_id, call.lease.weights.incarnation)
    return order


class SimulatedWorkers:
    """The `Workers` of the pipeline, as unreliable as the world wants them."""

    def __init__(self, world: World, truth: Truth, *, timeout_s: float) -> None:
        self._world = world
        self._truth = truth
        self._timeout_s = timeout_s
        self._processes: dict[WorkerId, _Process] = {}

    def start(self, worker: WorkerId) -> None:
        """Create a process; its constructor may fail, or never come back."""
        assert worker not in self._processes, f"{worker} is started twice"
        process = self._processes[worker] = _Process()
        self._world.tell(f"start {worker}")
        if self._world.strikes("start_failure"):
            self._world.later(self._world.random.uniform(0.0, 2.0), lambda: self._die(process))
        process.is_hung = self._world.strikes("start_hang")

    def kill(self, worker: WorkerId) -> None:
        """End a process, hung or not; what it was asked is answered with its death, sooner or later."""
        self._world.tell(f"kill {worker}")
        if worker in self._processes:
            self._die(self._processes[worker])

    def call(self, call: Call, reply: Reply) -> None:
        """Take a call; what becomes of it is decided now, by chance."""
        self._world.tell(f"call {call.call_id} {call.verb} {call.worker} {call.lease.group_id if call.lease else ''}")
        self._truth.called(call)
        process = self._processes[call.worker]
        if not process.is_alive:
            self._deliver(call, reply, _DIED, 0.01)
            return
        process.calls[call.call_id] = (call, reply)
        if process.is_hung:
            return
        world = self._world
        seconds = world.random.uniform(*_DURATIONS[call.verb])
        if (call.verb is Verb.LOAD and world.strikes("fetch_death")) or world.strikes("worker_death"):
            world.later(world.random.uniform(0.0, seconds), lambda: self._die(process))
        elif call.verb is not Verb.READY and world.strikes("worker_hang"):
            world.later(world.random.uniform(0.0, seconds), lambda: self._hang(process))
        elif world.strikes("worker_cut_off"):
            # Its death is reported, and it is a lie: the value comes as well.
            self._deliver(call, reply, _DIED, world.random.uniform(0.0, 2.0 * seconds))
        attempt = _Attempt(call=call, process=process, holds=process.holds, lease=_order(call))
        world.later(seconds, lambda: self._finish(attempt, reply))

    def check_asleep(self) -> None:
        """Accuse whoever holds weights, as the learner works with the same memory."""
        awake = [worker for worker, process in self._processes.items() if process.is_alive and process.holds]
        if awake:
            self._truth.accusations.append(f"the learner works while {awake} hold weights")

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.is_alive = False

    def _finish(self, attempt: _Attempt, reply: Reply) -> None:
        """The work is done: answer, unless the process is gone, stopped, or the answer is lost on its way."""
        call, process, world = attempt.call, attempt.process, self._world
        if not process.is_alive or process.is_hung:
            return
        process.calls.pop(call.call_id, None)
        answer = self._answer(attempt)
        if world.strikes("reply_lost"):
            return
        seconds = world.random.uniform(0.0, 0.2)
        if world.strikes("reply_late"):
            seconds = world.random.uniform(0.5, 3.0) * self._timeout_s
        self._deliver(call, reply, answer, seconds)
        if world.strikes("reply_twice"):
            self._deliver(call, reply, answer, seconds + world.random.uniform(0.0, 2.0 * self._timeout_s))

    def _answer(self, attempt: _Attempt) -> Any:
        call = attempt.call
        if call.verb is Verb.LOAD:
            held: Held = call.payload.buckets[0].handle
            if held.gang not in self._truth.living_gangs or self._world.strikes("fetch_failure"):
                return Failure(kind=FailureKind.INFRA, text="the weights could not be fetched (simulated)")
            attempt.process.holds = held
        if call.verb is Verb.SLEEP:
            attempt.process.holds = None
        if call.verb is Verb.READY and self._world.strikes("start_error"):
            return Failure(kind=FailureKind.DATA, text="the constructor raised (simulated)")
        if call.verb is Verb.STATS:
            return {"resident_bytes": 2.0**30}
        if call.lease is None:
            return None
        failure = self._failure(call)
        if failure is not None:
            return failure
        if call.verb is Verb.SCORE:
            return judged(call.payload[0], self._truth.data)
        assert attempt.lease is not None, "a group is generated by its order"
        content = self._truth.generated(call, attempt.lease, attempt.holds)
        rows = rollouts_of(content, call.payload.table, attempt.lease, call.lease.weights.version)
        return rows, {"num_tokens": 2.0, "generate_s": 1.0}

    def _failure(self, call: Call) -> Failure | None:
        world, truth = self._world, self._truth
        assert call.lease is not None, f"call {call.call_id} has a lease"
        group_id = call.lease.group_id
        if truth.always_fails(call):
            world.injected["group_malformed"] += 1
            return Failure(kind=FailureKind.DATA, text="malformed (simulated)")
        if world.strikes("infra_failure"):
            return Failure(kind=FailureKind.INFRA, text="a connection was lost (simulated)")
        if group_id not in truth.failed_once and world.strikes("data_failure"):
            truth.failed_once.add(group_id)
            return Failure(kind=FailureKind.DATA, text="an odd value (simulated)")
        return None

    def _die(self, process: _Process) -> None:
        if not process.is_alive:
            return
        process.is_alive = False
        for call, reply in process.calls.values():
            self._deliver(call, reply, _DIED, self._world.random.uniform(0.0, 0.5))
        process.calls.clear()

    def _hang(self, process: _Process) -> None:
        process.is_hung = True

    def _deliver(self, call: Call, reply: Reply, answer: Any, seconds: float) -> None:
        def arrive() -> None:
            text = f"failure: {answer.text}" if isinstance(answer, Failure) else "value"
            self._world.tell(f"reply {call.call_id} {call.verb} {call.worker} {text}")
            reply(call.call_id, answer)

        self._world.later(seconds, arrive)


_DURATIONS = {
    Verb.READY: (0.5, 3.0),
    Verb.LOAD: (0.1, 1.0),
    Verb.GENERATE: (1.0, 8.0),
    Verb.SCORE: (0.2, 2.0),
    Verb.PING: (0.0, 0.1),
    Verb.STATS: (0.0, 0.1),
    Verb.SLEEP: (0.0, 0.5),
}
"""Seconds of an undisturbed call."""
