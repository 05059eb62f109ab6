"""The workers of one role: who is up, with which weights, who is started again and when a place is given up.

Pure: told what happened and when, it decides; no process, no clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from cluster.messages import Role, Weights, WorkerId

_LONGEST_BACKOFF_S = 30.0


class FleetError(RuntimeError):
    """No worker of a role is left and none may be started again; the message names the last cause and the remedy."""


class NotReadyError(FleetError):
    """A worker's first process did not come up in time: most often there is no place for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """How many workers, and what each may take."""

    count: int
    capacity: int
    """Groups in flight on one worker: enough to keep it busy, few enough that a death loses little."""
    ready_timeout_s: float
    max_restarts: int
    """Lives of one slot that may end without a single success, beyond the first."""


class MemberState(StrEnum):
    """Where a slot is."""

    DOWN = "down"
    STARTING = "starting"
    UP = "up"
    GIVEN_UP = "given up"


@dataclass(slots=True, kw_only=True)
class Member:
    """One slot of a fleet and its present process."""

    worker: WorkerId
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


class Fleet:
    """Members of one role.

    Example: one slot, max_restarts 1.  rollout-0.0 dies: rollout-0.1 starts at once; it dies before a success: the slot
    is given up, and the fleet is empty.  With a success in between the count begins anew.
    """

    def __init__(self, role: Role, config: FleetConfig) -> None:
        self.role = role
        self.config = config
        self.num_restarts = 0
        self.num_given_up = 0
        self.members = [Member(worker=WorkerId(role=role, slot=slot, life=0)) for slot in range(config.count)]
        self._last_cause = ""

    def member(self, worker: WorkerId) -> Member | None:
        """Return the slot whose present process this is, None when the process has been replaced or given up."""
        member = self.members[worker.slot]
        return member if member.worker == worker and member.state in (MemberState.STARTING, MemberState.UP) else None

    def start(self, now: float) -> list[WorkerId]:
        """Begin a life in every slot that is down and whose backoff is over."""
        started = [member for member in self.members if member.state is MemberState.DOWN and member.start_at <= now]
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
        failures = member.num_failures + 1
        life = WorkerId(role=self.role, slot=member.worker.slot, life=member.worker.life + 1)
        slot = self.members.index(member)
        if failures > self.config.max_restarts:
            self.members[slot] = Member(worker=member.worker, state=MemberState.GIVEN_UP)  # nothing is in flight there
            self.num_given_up += 1
            return f"{self._last_cause}; its place is given up after {failures} failures in a row"
        self.num_restarts += 1
        backoff = 0.0 if failures == 1 else min(_LONGEST_BACKOFF_S, 0.5 * 2.0 ** (failures - 2))
        self.members[slot] = Member(worker=life, num_failures=failures, start_at=now + backoff)
        return f"{self._last_cause}; {life} takes its place (failure {failures}, {self.config.max_restarts} allowed)"

    def pick(self, weights: Weights | None) -> Member | None:
        """Return the least busy worker that can take a group now; `weights` None = any."""
        free = [
            member
            for member in self.members
            if member.state is MemberState.UP
            and member.loading is None
            and member.num_groups < self.config.capacity
            and (weights is None or member.weights == weights)
        ]
        return min(free, key=lambda member: member.num_groups, default=None)

    def outdated(self, target: Weights) -> list[Member]:
        """Return the workers that sample from other weights than the target, and may load it now."""
        up = (member for member in self.members if member.state is MemberState.UP and member.loading is None)
        return [member for member in up if member.weights != target and not member.load_failure]

    def has_healthy(self) -> bool:
        """Whether a worker is up whose last work did not fail."""
        return any(member.state is MemberState.UP and member.num_sick == 0 for member in self.members)

    def wakeups(self) -> Iterator[float]:
        """Yield the times at which a slot may be started."""
        return (member.start_at for member in self.members if member.state is MemberState.DOWN)

    @property
    def is_empty(self) -> bool:
        """Whether every slot is given up."""
        return all(member.state is MemberState.GIVEN_UP for member in self.members)

    def exhausted(self) -> FleetError:
        """Return the error that says why nobody is left."""
        return FleetError(
            f"at least one of {self.config.count} {self.role} workers must live, and each died more than "
            f"{self.config.max_restarts} times without finishing a group in between; the last was {self._last_cause}; "
            "mend the cause and resume, or raise pipeline.max_restarts"
        )
