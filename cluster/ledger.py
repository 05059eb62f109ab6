"""Exactly-once accounting of groups: each accepted group is in one state, and nothing leaves unnamed.

    ACCEPTED -> LEASED -> GENERATED -> SCORED -> BATCHED -> TRAINED
                LEASED, GENERATED -> LEASED: the lease was lost and is issued again, under a fresh id
                any of the first five -> DROPPED | QUARANTINED

Pure: no clock, no Ray, no files.  Memory is constant in the number of groups that ended.  TRAINED becomes durable with
the checkpoint that holds the ledger's snapshot; a resume starts from the snapshot, so groups trained after it are
simply accepted again.  Every transition is recorded for `ledger_store.py`, which explains a run and decides nothing.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Protocol


class GroupState(StrEnum):
    """Where a group is; the last three are final."""

    ACCEPTED = "accepted"
    LEASED = "leased"
    GENERATED = "generated"
    SCORED = "scored"
    BATCHED = "batched"
    TRAINED = "trained"
    DROPPED = "dropped"
    QUARANTINED = "quarantined"


FINAL = (GroupState.TRAINED, GroupState.DROPPED, GroupState.QUARANTINED)
"""States that end a group."""

_IN_FLIGHT = frozenset(GroupState) - frozenset(FINAL)
_LEASABLE = frozenset({GroupState.ACCEPTED, GroupState.LEASED, GroupState.GENERATED})
_MAX_REASONS = 100
"""Reasons counted by name; those that come later are counted together, so that memory stays constant."""
_MAX_REASON_LENGTH = 200


class LedgerError(RuntimeError):
    """A group took a step that no group may take: a mistake in the pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A group's state and how it got there; None is what a state does not have."""

    group_id: str
    state: GroupState
    lease_id: int | None
    """Of the group's last lease, as are the next three."""
    worker: str | None
    version: int | None
    incarnation: int | None
    step: int | None
    """The step that the group is wanted for."""
    reason: str | None
    """Why the group was dropped or quarantined."""


class Ledger:
    """States of the groups in flight, and counts of those that ended.

    Example: accept("0/a"), lease("0/a", "rollout-0.0", 3, 0) -> 1, generated("0/a", 1), scored("0/a", 1),
    batch("0/a", 4), train("0/a", 4) gives accepted 1, trained 1, in flight 0.
    """

    def __init__(self) -> None:
        self._groups: dict[str, Transition] = {}
        """The last transition of each group in flight, in the order in which they were accepted."""
        self._ended: Counter[GroupState] = Counter()
        self._reasons: Counter[str] = Counter()
        self._num_accepted = 0
        self._num_leases = 0
        self._transitions: list[Transition] = []

    def accept(self, group_id: str, step: int | None = None) -> None:
        """Take responsibility for a group, which is wanted for a step."""
        if group_id in self._groups:
            raise LedgerError(f"group {group_id} must be accepted once, and is already {self._groups[group_id].state}")
        self._num_accepted += 1
        self._put(_accepted(group_id, step))

    def lease(self, group_id: str, worker: str, version: int, incarnation: int) -> int:
        """Hand a group to a worker with weights of a version; return the lease's fresh id.

        Also for a group whose lease was lost, or whose generated rows were: what its earlier lease answers from now on
        is late.
        """
        group = self._expect(group_id, _LEASABLE, GroupState.LEASED)
        self._num_leases += 1
        lease_id = self._num_leases
        self._put(
            replace(
                group,
                state=GroupState.LEASED,
                lease_id=lease_id,
                worker=worker,
                version=version,
                incarnation=incarnation,
            )
        )
        return lease_id

    def generated(self, group_id: str, lease_id: int) -> None:
        """Record that the group's current lease has generated its samples."""
        self._answer(group_id, lease_id, GroupState.LEASED, GroupState.GENERATED)

    def scored(self, group_id: str, lease_id: int) -> None:
        """Record that the samples of the group's current lease are judged."""
        self._answer(group_id, lease_id, GroupState.GENERATED, GroupState.SCORED)

    def batch(self, group_id: str, step: int) -> None:
        """Record that a group is part of a step's batch."""
        group = self._expect(group_id, {GroupState.SCORED}, GroupState.BATCHED)
        self._put(replace(group, state=GroupState.BATCHED, step=step))

    def leave_out(self, group_id: str, step: int, reason: str) -> None:
        """End a judged group as DROPPED: it has no place in a step's batch, for a named reason."""
        group = self._expect(group_id, {GroupState.SCORED}, GroupState.DROPPED)
        self._end(replace(group, step=step), GroupState.DROPPED, reason)

    def replay(self, group_id: str, lease_id: int, step: int, *, left_out: str | None = None) -> None:
        """Take an accepted group straight to where it was when its step's batch was written to the redo log.

        That is BATCHED, its judged rows being in the log, or DROPPED for the reason for which it was left out.  Leases
        handed out from now on have ids above the group's.
        """
        group = self._expect(group_id, {GroupState.ACCEPTED}, GroupState.BATCHED)
        self._num_leases = max(self._num_leases, lease_id)
        group = replace(group, lease_id=lease_id, step=step)
        if left_out is None:
            self._put(replace(group, state=GroupState.BATCHED))
        else:
            self._end(group, GroupState.DROPPED, left_out)

    def train(self, group_id: str, step: int) -> None:
        """Record that the learner has stepped on a group's batch."""
        group = self._expect(group_id, {GroupState.BATCHED}, GroupState.TRAINED)
        if group.step != step:
            raise LedgerError(f"group {group_id} must be trained in the step of its batch, {group.step}, got {step}")
        self._put(replace(group, state=GroupState.TRAINED))

    def end(self, group_id: str, state: GroupState, reason: str) -> None:
        """End a group as DROPPED or QUARANTINED for a named reason."""
        if state not in (GroupState.DROPPED, GroupState.QUARANTINED):
            raise LedgerError(f"group {group_id} must end as dropped or quarantined, got {state}")
        self._end(self._expect(group_id, _IN_FLIGHT, state), state, reason)

    def state(self, group_id: str) -> GroupState | None:
        """Return where a group in flight is; None for any other."""
        group = self._groups.get(group_id)
        return group.state if group else None

    def counts(self) -> dict[str, int]:
        """Return accepted, trained, dropped, quarantined and in_flight; the first is the sum of the others.

        Raises:
            LedgerError: when it is not.
        """
        counts = {
            "accepted": self._num_accepted,
            **{str(state): self._ended[state] for state in FINAL},
            "in_flight": len(self._groups),
        }
        if 2 * counts["accepted"] != sum(counts.values()):
            raise LedgerError(f"accepted groups must be trained, dropped, quarantined or in flight, got {counts}")
        return counts

    def take_transitions(self) -> list[Transition]:
        """Return the transitions since the last call, in order."""
        taken, self._transitions = self._transitions, []
        return taken

    def snapshot(self, *, without: Mapping[str, str | None] | None = None) -> dict[str, Any]:
        """Return plain data for the checkpoint.

        Args:
            without: groups that will be accepted again and are left out, with the reason of those that ended as
                QUARANTINED, None for those in flight.
        """
        without = without or {}
        reasons = [reason for reason in without.values() if reason is not None]
        quarantined = GroupState.QUARANTINED
        ended = self._ended - Counter({quarantined: len(reasons)})
        names = self._reasons - Counter(self._counted_as(quarantined, reason) for reason in reasons)
        return {
            "accepted": self._num_accepted - len(without),
            "leases": self._num_leases,
            "ended": {str(state): ended[state] for state in FINAL},
            "reasons": dict(names),
            "in_flight": {name: str(group.state) for name, group in self._groups.items() if name not in without},
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue from a checkpoint's snapshot; groups that were in flight come back as ACCEPTED."""
        self._num_accepted = snapshot["accepted"]
        self._num_leases = snapshot["leases"]
        self._ended = Counter({GroupState(state): count for state, count in snapshot["ended"].items()})
        self._reasons = Counter(snapshot["reasons"])
        self._groups, self._transitions = {}, []
        for group_id in snapshot["in_flight"]:
            self._put(_accepted(group_id, None))

    def _answer(self, group_id: str, lease_id: int, before: GroupState, after: GroupState) -> None:
        group = self._expect(group_id, {before}, after)
        if group.lease_id != lease_id:
            raise LedgerError(
                f"group {group_id} must be {after} by its current lease, {group.lease_id}, got lease {lease_id}; "
                "a late reply must be fenced before it gets here"
            )
        self._put(replace(group, state=after))

    def _end(self, group: Transition, state: GroupState, reason: str) -> None:
        name = self._counted_as(state, reason)
        self._reasons[name] += 1
        self._put(replace(group, state=state, reason=reason))

    def _counted_as(self, state: GroupState, reason: str) -> str:
        name = f"{state}: {reason}"[:_MAX_REASON_LENGTH]
        is_known = name in self._reasons or len(self._reasons) < _MAX_REASONS
        return name if is_known else f"{state}: other reasons"

    def _expect(self, group_id: str, before: set[GroupState] | frozenset[GroupState], after: GroupState) -> Transition:
        group = self._groups.get(group_id)
        if group is None or group.state not in before:
            current = group.state if group else "not in flight"
            raise LedgerError(f"group {group_id} must be {' or '.join(sorted(before))} to become {after}, is {current}")
        return group

    def _put(self, group: Transition) -> None:
        self._transitions.append(group)
        if group.state in FINAL:
            del self._groups[group.group_id]
            self._ended[group.state] += 1
        else:
            self._groups[group.group_id] = group


def _accepted(group_id: str, step: int | None) -> Transition:
    return Transition(
        group_id=group_id,
        state=GroupState.ACCEPTED,
        lease_id=None,
        worker=None,
        version=None,
        incarnation=None,
        step=step,
        reason=None,
    )


class LedgerJournal(Protocol):
    """Keeps transitions for people to read; `LedgerStore` is one."""

    def append(self, transitions: Sequence[Transition], now: float) -> None:
        """Write them durably, all or none."""

    def close(self) -> None:
        """Write what is buffered."""


class Unrecorded:
    """A journal that keeps nothing."""

    def append(self, transitions: Sequence[Transition], now: float) -> None:
        """Forget them."""

    def close(self) -> None:
        """Do nothing."""
