"""What the dispatcher, the workers and the pipeline say to each other; plain data, no process, no clock."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Role(StrEnum):
    """What a worker does."""

    ROLLOUT = "rollout"
    REWARD = "reward"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Weights:
    """What a rollout worker samples from; the incarnation grows whenever the learner went back to a checkpoint."""

    incarnation: int
    version: int

    def __str__(self) -> str:
        return f"{self.version}" if self.incarnation == 0 else f"{self.version} (incarnation {self.incarnation})"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class WorkerId:
    """One process: the `life`-th one, from 0, in a slot of its fleet."""

    role: Role
    slot: int
    life: int

    def __str__(self) -> str:
        return f"{self.role}-{self.slot}.{self.life}"


class Verb(StrEnum):
    """What a worker is asked."""

    READY = "ready"
    LOAD = "load"
    GENERATE = "generate"
    SCORE = "score"
    PING = "ping"
    STATS = "stats"
    SLEEP = "sleep"


class FailureKind(StrEnum):
    """Whose fault a failure is, which decides what happens next."""

    DIED = "died"
    """The process is gone."""
    INFRA = "infra"
    """The machinery failed; another attempt may succeed."""
    DATA = "data"
    """The group or our code is at fault; unknown failures count as this, so that mistakes are loud."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a call answers when it has no value."""

    kind: FailureKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One attempt at a group: the right, and the order, to generate it with these weights."""

    lease_id: int
    group_id: str
    worker: WorkerId
    weights: Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Create the process of a worker."""

    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """End a process at once, whether it answers or not."""

    worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Ask a worker something; the answer comes back under `call_id`."""

    call_id: int
    worker: WorkerId
    verb: Verb
    payload: Any
    """LOAD: what was published; GENERATE: the group's work, answered by rollouts and numbers (`num_bytes`); SCORE: that
    answer; otherwise None."""
    lease: Lease | None


Command = Start | Kill | Call

Reply = Callable[[int, Any], None]
"""Takes a call's id and its value or `Failure`; may come late, twice or never."""


class Workers(Protocol):
    """Processes as the pipeline sees them.  No method waits for a process."""

    def start(self, worker: WorkerId) -> None:
        """Create a process."""

    def kill(self, worker: WorkerId) -> None:
        """End a process, also one that is stopped; one that is gone already is no error."""

    def call(self, call: Call, reply: Reply) -> None:
        """Send a call; `reply` is called later, from any thread."""

    def close(self) -> None:
        """End all processes."""
