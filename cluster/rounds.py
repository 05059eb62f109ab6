"""Groups on their way through the workers, the rounds they belong to, and the queues in which they wait."""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.ledger import GroupState, Ledger
from cluster.messages import Lease


@dataclass(slots=True, kw_only=True)
class Round:
    """Groups that are wanted together."""

    rank: int = 0
    """Rounds of a smaller rank go first: evaluation has 0, a step its number."""
    finished: dict[str, Any] = field(default_factory=dict)
    """Group -> what SCORE answered."""
    leases: dict[str, int] = field(default_factory=dict)
    """Finished group -> the lease that finished it."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Group -> reason."""
    num_open: int = 0
    num_bytes: int = 0
    """Of the rollouts generated for it."""
    first_lease_at: float | None = None
    last_generated_at: float = 0.0
    last_finished_at: float = 0.0

    @property
    def is_done(self) -> bool:
        """Whether every group has ended one way or the other."""
        return self.num_open == 0


@dataclass(slots=True, kw_only=True, eq=False)
class Group:
    """One group until it ends."""

    group_id: str
    order: tuple[int, int]
    """Its round's rank, and when it was admitted: the smaller goes first, however often it is tried."""
    work: Any
    round: Round
    ledger: Ledger
    lease: Lease | None = None
    rollouts: Any = None
    num_retries: int = 0
    data_failure: str = ""
    """Its first failure that was its own."""
    num_bytes: int = 0
    """Of its rollouts, from when they are generated."""

    def generated(self, answer: Any, now: float) -> None:
        """Take what GENERATE answered."""
        assert self.lease is not None, f"{self.group_id} has been leased"
        self.ledger.generated(self.group_id, self.lease.lease_id)
        # a worker need not say how large its answer is
        self.rollouts, self.num_bytes = answer, int(answer[1].get("num_bytes", 0)) if isinstance(answer, tuple) else 0
        self.round.num_bytes += self.num_bytes
        self.round.last_generated_at = now

    def finished(self, answer: Any, now: float) -> None:
        """Take what SCORE answered."""
        assert self.lease is not None, f"{self.group_id} has been leased"
        self.ledger.scored(self.group_id, self.lease.lease_id)
        self.round.finished[self.group_id] = answer
        self.round.leases[self.group_id] = self.lease.lease_id
        self.round.last_finished_at = now
        self.round.num_open -= 1

    def quarantined(self, reason: str) -> None:
        """End it through its own fault."""
        self.ledger.end(self.group_id, GroupState.QUARANTINED, reason)
        self.discard_rollouts()
        self.round.quarantined[self.group_id] = reason
        self.round.num_open -= 1

    def discard_rollouts(self) -> None:
        """Forget them: it will be generated again, or not at all."""
        self.round.num_bytes -= self.num_bytes
        self.rollouts, self.num_bytes = None, 0


class Queue:
    """Groups that wait for a worker, first admitted first; after a failure a group may rest before it waits again."""

    def __init__(self) -> None:
        self._waiting: list[tuple[tuple[int, int], Group]] = []
        self._resting: list[tuple[float, tuple[int, int], Group]] = []

    def __len__(self) -> int:
        """Return how many groups wait, without those that rest."""
        return len(self._waiting)

    def add(self, group: Group) -> None:
        """Let a group wait."""
        heapq.heappush(self._waiting, (group.order, group))

    def rest(self, group: Group, until: float) -> None:
        """Let a group wait from a time on."""
        heapq.heappush(self._resting, (until, group.order, group))

    @property
    def first(self) -> Group:
        """The group whose turn it is."""
        return self._waiting[0][1]

    def pop(self) -> Group:
        """Return the group whose turn it is."""
        return heapq.heappop(self._waiting)[1]

    def wake(self, now: float) -> None:
        """Let those wait whose rest is over."""
        while self._resting and self._resting[0][0] <= now:
            self.add(heapq.heappop(self._resting)[2])

    def wakeups(self) -> Iterator[float]:
        """Yield the time at which the next rest is over, if any group rests."""
        return (until for until, _, _ in self._resting[:1])
