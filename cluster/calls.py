"""Calls that wait for an answer, and workers that must give a sign of life: found without looking at all of them."""

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cluster.messages import Call, Verb, WorkerId
from cluster.rounds import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A call that is not answered."""

    call: Call
    group: Group | None
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
    """Which slots must be asked for a sign of life, and when.

    A slot is watched once; that it has been heard of meanwhile shows when its time comes.  Example: asked after 5 s of
    silence, watched at 0 s, heard of at 3 s: looked at at 5 s, watched again for 8 s.
    """

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._due: list[tuple[float, int]] = []
        self._watched: set[int] = set()

    def watch(self, slot: int, heard_at: float) -> None:
        """Look after a slot from now on."""
        if slot not in self._watched:
            self._watched.add(slot)
            heapq.heappush(self._due, (heard_at + self._silence_s, slot))

    def due(self, now: float, heard_at: Callable[[int], float | None]) -> list[int]:
        """Return the slots to be asked now, which are watched no longer.

        Args:
            now: seconds.
            heard_at: when a slot was heard of; None = it need not be watched.
        """
        silent = []
        while self._due and self._due[0][0] <= now:
            _, slot = heapq.heappop(self._due)
            self._watched.discard(slot)
            heard = heard_at(slot)
            if heard is None:
                continue
            if heard + self._silence_s <= now:
                silent.append(slot)
            else:
                self.watch(slot, heard)
        return sorted(silent)

    def next(self) -> float | None:
        """Return when to look again."""
        return self._due[0][0] if self._due else None
