"""Calls that wait for an answer, and workers that must give a sign of life: found without looking at all of them."""

import heapq
from collections import Counter
from dataclasses import dataclass

from cluster.fleet import Fleet, Member
from cluster.messages import Call, Verb, WorkerId
from cluster.rounds import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A call that is not answered."""

    call: Call
    group: Group | None
    sent_at: float
    deadline: float


class Calls:
    """Calls in flight, by number, worker and deadline."""

    def __init__(self) -> None:
        self._calls: dict[int, Pending] = {}
        self._of_worker: dict[WorkerId, dict[int, Pending]] = {}
        self._deadlines: list[tuple[float, int]] = []
        """A heap; what has been answered is left out when its turn comes."""
        self._counts: Counter[Verb] = Counter()

    def add(self, pending: Pending) -> None:
        """Wait for an answer."""
        call = pending.call
        self._calls[call.call_id] = pending
        self._of_worker.setdefault(call.worker, {})[call.call_id] = pending
        heapq.heappush(self._deadlines, (pending.deadline, call.call_id))
        self._counts[call.verb] += 1

    def pop(self, call_id: int) -> Pending | None:
        """Wait no longer; None where nobody did."""
        pending = self._calls.pop(call_id, None)
        if pending is not None:
            of_worker = self._of_worker[pending.call.worker]
            del of_worker[call_id]
            if not of_worker:
                del self._of_worker[pending.call.worker]
            self._counts[pending.call.verb] -= 1
        return pending

    def of(self, worker: WorkerId) -> list[Pending]:
        """Return what a worker owes, the oldest first."""
        return list(self._of_worker.get(worker, {}).values())

    def owes(self, worker: WorkerId, verb: Verb) -> bool:
        """Return whether a worker owes an answer of a kind."""
        return any(pending.call.verb is verb for pending in self._of_worker.get(worker, {}).values())

    def num(self, verb: Verb) -> int:
        """Return how many calls of a kind are in flight."""
        return self._counts[verb]

    def next_deadline(self) -> float | None:
        """Return the earliest deadline."""
        while self._deadlines and self._deadlines[0][1] not in self._calls:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def late(self, now: float) -> dict[WorkerId, Verb]:
        """Return the workers whose time is up, with what they were asked first of what is late."""
        numbers = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            numbers.append(heapq.heappop(self._deadlines)[1])
        late: dict[WorkerId, Verb] = {}
        for number in sorted(numbers):
            call = self._calls[number].call
            late.setdefault(call.worker, call.verb)
        return late


class Heartbeats:
    """Which workers of a fleet must be asked for a sign of life, and when.

    A worker is watched once, while it has groups; that it has been heard of meanwhile shows when its time comes.
    Example: asked after 5 s of silence, watched at 0 s, heard of at 3 s: looked at at 5 s, watched again for 8 s.
    """

    def __init__(self, silence_s: float, fleet: Fleet, calls: Calls) -> None:
        self._silence_s = silence_s
        self._fleet = fleet
        self._calls = calls
        self._due: list[tuple[float, int]] = []
        self._watched: set[int] = set()

    def watch(self, member: Member) -> None:
        """Look after a worker from now on, if it is one of the fleet's and has groups."""
        worker = member.worker
        if worker.role is self._fleet.role and member.num_groups and worker.slot not in self._watched:
            self._watched.add(worker.slot)
            heapq.heappush(self._due, (member.heard_at + self._silence_s, worker.slot))

    def due(self, now: float) -> list[WorkerId]:
        """Return the workers to be asked now, which are watched no longer."""
        silent = []
        while self._due and self._due[0][0] <= now:
            _, slot = heapq.heappop(self._due)
            self._watched.discard(slot)
            member = self._fleet.members[slot]
            if self._calls.owes(member.worker, Verb.PING):
                continue
            if member.num_groups and member.heard_at + self._silence_s <= now:
                silent.append(member.worker)
            else:
                self.watch(member)
        return sorted(silent)

    def next(self) -> float | None:
        """Return when to look again."""
        return self._due[0][0] if self._due else None
