"""Simulated time for a real driver: what it computes takes as long as it took, everything else as long as is said.

The driver is one core: whatever it does (the pipeline's turns, Ray's share of each call, what the loop does in Python)
is done one thing after another, and what arrives meanwhile waits.  A turn of the pipeline is really taken and its CPU
time measured; what it waited for the ledger's file is added.  Calls leave at the end of the turn that made them.
"""

import gc
import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from benchmarks.scale_workload import JUDGE_S, LOAD_S, NETWORK_S, ROWS, TOKENS_PER_S, response_lengths, samples_named
from cluster.ledger import Transition
from cluster.ledger_store import LedgerStore
from cluster.messages import Call, Reply, Role, Verb, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Charges:
    """What the driver spends beyond what is measured here, seconds."""

    call_s: float
    """Of one core, on Ray's side of a call to a worker and of its answer."""
    fetch_s: float
    """Of one core, to bring a group's rows from the object store."""
    redo_cpu_s: float
    """To write a group to the redo log: of another core, for Arrow encodes without Python's lock."""
    redo_wall_s: float
    """To write a group to the redo log, until it is durable: the loop waits, the pipeline goes on."""
    step_s: float
    """Of one core, a step: metrics and their files."""


class World:
    """The clock, what will happen, and the driver's core."""

    def __init__(self) -> None:
        self.now = 0.0
        self.busy_s = 0.0
        """Of the driver's core, all told."""
        self.free_at = 0.0
        """When the driver's core has done what it has begun."""
        self.num_turns = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Have something happen at a time."""
        heapq.heappush(self._events, (when, next(self._numbers), action))

    def charge(self, seconds: float) -> None:
        """Keep the driver's core busy."""
        self.free_at = max(self.free_at, self.now) + seconds
        self.busy_s += seconds

    def turn(self, advance: Callable[[], float], wakeup: float | None) -> None:
        """Let the next things happen, as many as have by the time the driver is free, and let it deal with them.

        Args:
            advance: deals with them; returns seconds to charge.
            wakeup: when it wants to look at the clock.
        """
        first = min([event[0] for event in self._events[:1]] + ([] if wakeup is None else [wakeup]))
        self.now = max(self.now, first, self.free_at)
        while self._events and self._events[0][0] <= self.now:
            heapq.heappop(self._events)[2]()
        self.charge(advance())
        self.num_turns += 1


class Meter:
    """Measures the driver's own CPU time; the garbage collector runs in there, and only there."""

    def __init__(self) -> None:
        self.disk_s = 0.0
        gc.collect()
        gc.disable()

    def measure(self, action: Callable[[], Any]) -> float:
        """Return the CPU seconds of doing something, and what it waited for the disk."""
        self.disk_s = 0.0
        gc.enable()
        started = time.thread_time()
        try:
            action()
        finally:
            spent = time.thread_time() - started
            gc.disable()
        return spent + self.disk_s


class Journal(LedgerStore):
    """The ledger's file; what the thread waits for it beside its CPU time goes to the meter."""

    def __init__(self, path: str, meter: Meter) -> None:
        super().__init__(path)
        self._meter = meter

    def append(self, transitions: Sequence[Transition], now: float) -> None:
        """Write."""
        wall, cpu = time.perf_counter(), time.thread_time()
        super().append(transitions, now)
        self._meter.disk_s += max(0.0, time.perf_counter() - wall - (time.thread_time() - cpu))


class RolloutRows:
    """The rows of a rollout worker's engine: samples take them in the order of their groups.

    Example: two rows, samples of 3, 5 and 2 seconds: the third begins when the first is done, and ends at 5 s too.
    """

    def __init__(self) -> None:
        self._free_at = [0.0] * ROWS
        self.busy_s = 0.0

    def generate(self, group_id: str, now: float) -> float:
        """Return when a group that comes now is done."""
        done = now
        for length in response_lengths(group_id):
            seconds = length * ROWS / TOKENS_PER_S
            ends = max(now, self._free_at[0]) + seconds
            heapq.heapreplace(self._free_at, ends)
            self.busy_s += seconds
            done = max(done, ends)
        return done


class ScaleWorkers:
    """The `Workers` of the pipeline: they never fail, and take as long as real ones.

    Args:
        world: the clock.
        templates: SAMPLES of groups, whose names are replaced.
    """

    def __init__(self, world: World, templates: Sequence[pa.Table]) -> None:
        self.num_calls = 0
        self.rows: dict[int, RolloutRows] = {}
        self._world = world
        self._templates = templates
        self._judge_free_at: dict[int, float] = {}
        self._sent: list[tuple[Call, Reply]] = []

    def start(self, worker: WorkerId) -> None:
        """Create a process."""
        if worker.role is Role.ROLLOUT:
            self.rows[worker.slot] = RolloutRows()
        else:
            self._judge_free_at[worker.slot] = 0.0

    def kill(self, worker: WorkerId) -> None:
        """Nobody dies here."""
        raise AssertionError(f"{worker} must not be killed: nothing goes wrong in this world")

    def call(self, call: Call, reply: Reply) -> None:
        """Take a call; it leaves at the end of the turn."""
        self.num_calls += 1
        self._sent.append((call, reply))

    def close(self) -> None:
        """End nothing."""

    def depart(self) -> None:
        """Let the turn's calls leave, now that it has been charged."""
        sent, self._sent = self._sent, []
        for call, reply in sent:
            arrival = self._world.free_at + NETWORK_S
            done = self._done_at(call, arrival)
            self._world.at(done + NETWORK_S, partial(self._answer, call, reply))

    def _done_at(self, call: Call, arrival: float) -> float:
        slot = call.worker.slot
        match call.verb:
            case Verb.GENERATE:
                assert call.lease is not None, "a group is generated under a lease"
                return self.rows[slot].generate(call.lease.group_id, arrival)
            case Verb.SCORE:
                done = self._judge_free_at[slot] = max(arrival, self._judge_free_at[slot]) + JUDGE_S
                return done
            case Verb.LOAD:
                return arrival + LOAD_S
            case _:
                return arrival

    def _answer(self, call: Call, reply: Reply) -> None:
        value: Any = None
        if call.verb is Verb.STATS:
            value = {"resident_bytes": 0.0}
        elif call.lease is not None and call.verb is Verb.GENERATE:
            num_tokens = sum(response_lengths(call.lease.group_id))
            value = ("rollouts", {"num_tokens": num_tokens, "num_bytes": 16 * num_tokens, "generate_s": 1.0})
        elif call.lease is not None:
            template = self._templates[call.lease.lease_id % len(self._templates)]
            value = ("scored", samples_named(template, call.lease.group_id))
        reply(call.call_id, value)
