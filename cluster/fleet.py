"""The workers of one role: who is up, with which weights, who is started again and when a place is given up.

Pure: told what happened and when, it decides; no process, no clock.

Asked after every answer, so nothing here looks at all members each time: a member notes in its fleet's books that it
has changed, and a question is answered from lists that are brought up to date where something has changed.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cluster.messages import Role, Weights, WorkerId

_LONGEST_BACKOFF_S = 30.0

_NOTED = frozenset({"state", "weights", "loading", "load_failure", "num_groups"})
"""What decides on which of its fleet's lists a member is."""


class FleetError(RuntimeError):
    """No worker of a role is left and none may be started again; the message names the last cause and the remedy."""


class NotReadyError(FleetError):
    """A worker's first process did not come up in time: most often there is no place for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """How many workers, and what each may take."""

    count: int
    """Workers that the run begins with."""
    capacity: int
    """Groups in flight on one worker: enough to keep it busy, few enough that a death loses little."""
    ready_timeout_s: float
    max_restarts: int
    """Lives of one slot that may end without a single success, beyond the first."""
    max_count: int = 0
    """Workers at most, where nodes that join the cluster have room for more than `count`."""


class MemberState(StrEnum):
    """Where a slot is."""

    ABSENT = "absent"
    """Beyond those that the run begins with, and no room was found for it."""
    DOWN = "down"
    STARTING = "starting"
    UP = "up"
    GIVEN_UP = "given up"


@dataclass(slots=True, kw_only=True)
class Member:
    """One slot of a fleet and its present process."""

    worker: WorkerId
    changed: set[int] = field(default_factory=set, repr=False, compare=False)
    """Its fleet's: slots that are to be looked at again."""
    state: MemberState = MemberState.DOWN
    weights: Weights | None = None
    """What the process samples from."""
    loading: Weights | None = None
    """What it is taking on; it gets no group meanwhile."""
    load_failure: str = ""
    """Why it could not take on the newest weights; empty when it may try."""
    num_sick: int = 0
    """Failures of the machinery on it, without a success in between."""
    num_groups: int = 0
    """Groups in flight on it."""
    num_failures: int = 0
    """Deaths since its last success."""
    start_at: float = 0.0
    """When it may be started, while it is down."""
    heard_at: float = 0.0
    """When it last answered."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name in _NOTED:
            self.changed.add(self.worker.slot)


class _Free:
    """Members that sample from the same weights and can take a group, the least busy one first.

    A heap of (groups in flight, slot) in which an entry may be out of date; it is left out when its turn comes.

    Example: slots 0 and 1 with one group each: (1, 0), (1, 1).  Slot 0 takes another: (1, 0), (1, 1), (2, 0), of which
    the first is out of date, so slot 1 is next.
    """

    def __init__(self, weights: Weights | None) -> None:
        self.weights = weights
        self._heap: list[tuple[int, int]] = []
        self._entries: set[tuple[int, int]] = set()

    def holds(self, member: Member, capacity: int) -> bool:
        """Whether a member can take a group now."""
        return (
            member.state is MemberState.UP
            and member.loading is None
            and member.num_groups < capacity
            and (self.weights is None or member.weights == self.weights)
        )

    def add(self, member: Member) -> None:
        """Note how busy a member is."""
        entry = (member.num_groups, member.worker.slot)
        if entry not in self._entries:  # so that there are at most capacity times slots
            self._entries.add(entry)
            heapq.heappush(self._heap, entry)

    def first(self, members: list[Member], capacity: int) -> Member | None:
        """Return the least busy member, of several the one in the lowest slot."""
        while self._heap:
            num_groups, slot = self._heap[0]
            member = members[slot]
            if member.num_groups == num_groups and self.holds(member, capacity):
                return member
            self._entries.discard(heapq.heappop(self._heap))
        return None


class Fleet:
    """Members of one role.

    Example: one slot, max_restarts 1.  rollout-0.0 dies: rollout-0.1 starts at once; it dies before a success: the slot
    is given up, and the fleet is empty.  With a success in between the count begins anew.

    With max_count 2 there is a slot 1, absent until `grow` says that there is room for it, and absent again when its
    process dies: the node may be gone.
    """

    def __init__(self, role: Role, config: FleetConfig) -> None:
        self.role = role
        self.config = config
        self.num_restarts = 0
        self.num_given_up = 0
        self._changed: set[int] = set()
        slots = range(max(config.count, config.max_count))
        self.members = [Member(worker=WorkerId(role=role, slot=s, life=0), changed=self._changed) for s in slots]
        for member in self.members[config.count :]:
            member.state = MemberState.ABSENT
        self._last_cause = ""
        self._unseen = set(slots)
        self._down: set[int] = set()
        self._starting: set[int] = set()
        self._failed_loads: set[int] = set()
        self._target: Weights | None = None
        self._outdated: set[int] = set()
        self._free = _Free(None)

    def member(self, worker: WorkerId) -> Member | None:
        """Return the slot whose present process this is, None when the process has been replaced or given up."""
        member = self.members[worker.slot]
        return member if member.worker == worker and member.state in (MemberState.STARTING, MemberState.UP) else None

    def is_first(self, worker: WorkerId) -> bool:
        """Whether the run begins with this process: where it cannot start, none of its kind can."""
        return worker.life == 0 and worker.slot < self.config.count

    def grow(self, count: int) -> None:
        """Say that there is room for so many more; as many as are absent will be started."""
        absent = [member for member in self.members if member.state is MemberState.ABSENT]
        for member in absent[:count]:
            member.state = MemberState.DOWN

    def start(self, now: float) -> list[WorkerId]:
        """Begin a life in every slot that is down and whose backoff is over."""
        self._look()
        if not self._down:
            return []
        started = [member for member in self._in_order(self._down) if member.start_at <= now]
        for member in started:
            member.state = MemberState.STARTING
        return [member.worker for member in started]

    def up(self, member: Member, now: float) -> None:
        """Say that a process is ready for calls."""
        member.state = MemberState.UP
        member.heard_at = now

    def succeeded(self, member: Member) -> None:
        """Say that a process has finished a group."""
        member.num_failures = 0
        member.num_sick = 0

    def died(self, member: Member, cause: str, now: float) -> str:
        """Say that a process is gone; its slot waits for the next life, or is given up: return which, in one line."""
        self._last_cause = f"{member.worker}: {cause}"
        failures, slot = member.num_failures + 1, member.worker.slot
        life = WorkerId(role=self.role, slot=slot, life=member.worker.life + 1)
        if failures > self.config.max_restarts:
            gone = Member(worker=member.worker, changed=self._changed, state=MemberState.GIVEN_UP)
            self.members[slot] = gone  # nothing is in flight there
            self.num_given_up += 1
            return f"{self._last_cause}; its place is given up after {failures} failures in a row"
        if slot >= self.config.count:
            freed = Member(worker=life, changed=self._changed, num_failures=failures, state=MemberState.ABSENT)
            self.members[slot] = freed
            return f"{self._last_cause}; another takes its place when there is room"
        self.num_restarts += 1
        backoff = 0.0 if failures == 1 else min(_LONGEST_BACKOFF_S, 0.5 * 2.0 ** (failures - 2))
        self.members[slot] = Member(worker=life, changed=self._changed, num_failures=failures, start_at=now + backoff)
        return f"{self._last_cause}; {life} takes its place (failure {failures}, {self.config.max_restarts} allowed)"

    def pick(self, weights: Weights | None) -> Member | None:
        """Return the least busy worker that can take a group now; `weights` None = any."""
        self._look()
        if self._free.weights != weights:
            self._free = _Free(weights)
            self._list_free(self.members)
        return self._free.first(self.members, self.config.capacity)

    def outdated(self, target: Weights) -> list[Member]:
        """Return the workers that sample from other weights than the target, and may load it now."""
        self._look()
        if self._target != target:
            self._target = target
            self._list_outdated(self.members)
        return self._in_order(self._outdated)

    def failed_loads(self) -> list[Member]:
        """Return the workers that could not take on the newest weights."""
        self._look()
        return self._in_order(self._failed_loads)

    def take_changed(self) -> list[Member]:
        """Return the members that may do something else than at the last call: all of them at the first."""
        self._look()
        unseen, self._unseen = self._unseen, set()
        return self._in_order(unseen)

    def has_healthy(self) -> bool:
        """Whether a worker is up whose last work did not fail."""
        return any(member.state is MemberState.UP and member.num_sick == 0 for member in self.members)

    def wakeups(self) -> Iterator[float]:
        """Yield the times at which a slot may be started."""
        self._look()
        return (self.members[slot].start_at for slot in self._down)

    @property
    def is_ready(self) -> bool:
        """Whether every worker is up or given up."""
        self._look()
        return not self._down and not self._starting

    @property
    def is_empty(self) -> bool:
        """Whether every slot is given up or absent."""
        return all(member.state in (MemberState.GIVEN_UP, MemberState.ABSENT) for member in self.members)

    def exhausted(self) -> FleetError:
        """Return the error that says why nobody is left."""
        return FleetError(
            f"at least one of {self.config.count} {self.role} workers must live, and each died more than "
            f"{self.config.max_restarts} times without finishing a group in between; the last was {self._last_cause}; "
            "mend the cause and resume, or raise pipeline.max_restarts"
        )

    def _look(self) -> None:
        """Bring the lists up to date."""
        if not self._changed:
            return
        changed = [self.members[slot] for slot in self._changed]
        self._unseen |= self._changed
        self._changed.clear()
        for member in changed:
            slot = member.worker.slot
            _put(self._down, slot, member.state is MemberState.DOWN)
            _put(self._starting, slot, member.state is MemberState.STARTING)
            _put(self._failed_loads, slot, bool(member.load_failure))
        self._list_outdated(changed)
        self._list_free(changed)

    def _list_outdated(self, members: list[Member]) -> None:
        for member in members:
            may_load = member.state is MemberState.UP and member.loading is None and not member.load_failure
            _put(self._outdated, member.worker.slot, may_load and member.weights != self._target)

    def _list_free(self, members: list[Member]) -> None:
        for member in members:
            if self._free.holds(member, self.config.capacity):
                self._free.add(member)

    def _in_order(self, slots: set[int]) -> list[Member]:
        return [self.members[slot] for slot in sorted(slots)] if slots else []


def _put(slots: set[int], slot: int, is_in: bool) -> None:
    if is_in:
        slots.add(slot)
    else:
        slots.discard(slot)
