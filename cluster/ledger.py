"""Exactly-once accounting of groups: each accepted group is in one state, and nothing leaves unnamed.

Pure: no clock, no Ray, no files.  TRAINED becomes durable with the checkpoint that holds the ledger's snapshot; a
resume starts from the snapshot, so groups trained after it are simply accepted again.
"""

from collections import Counter
from enum import StrEnum
from typing import Any


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


_NEXT = {
    GroupState.ACCEPTED: {GroupState.LEASED},
    GroupState.LEASED: {GroupState.GENERATED, GroupState.LEASED},
    GroupState.GENERATED: {GroupState.SCORED},
    GroupState.SCORED: {GroupState.BATCHED},
    GroupState.BATCHED: {GroupState.TRAINED},
}
_ENDS = {GroupState.DROPPED, GroupState.QUARANTINED}
_FINAL = {GroupState.TRAINED, *_ENDS}


class LedgerError(RuntimeError):
    """A group took a step that no group may take: a mistake in the pipeline."""


class Ledger:
    """States of the groups in flight, and counts of those that ended.

    Example: accept("0/a"), lease("0/a") -> 1, move("0/a", GENERATED), ..., move("0/a", TRAINED) gives
    accepted 1, trained 1, in flight 0.
    """

    def __init__(self) -> None:
        self._states: dict[str, GroupState] = {}
        self._ended: Counter[GroupState] = Counter()
        self._reasons: Counter[str] = Counter()
        self._num_accepted = 0
        self._num_leases = 0

    def accept(self, group_id: str) -> None:
        """Take responsibility for a group."""
        if group_id in self._states:
            raise LedgerError(f"group {group_id} must be accepted once, and is already {self._states[group_id]}")
        self._states[group_id] = GroupState.ACCEPTED
        self._num_accepted += 1

    def lease(self, group_id: str) -> int:
        """Hand a group to a worker; return the lease's fresh id."""
        self._advance(group_id, GroupState.LEASED)
        self._num_leases += 1
        return self._num_leases

    def move(self, group_id: str, state: GroupState) -> None:
        """Take a group to its next state."""
        self._advance(group_id, state)

    def end(self, group_id: str, state: GroupState, reason: str) -> None:
        """End a group as DROPPED or QUARANTINED for a named reason."""
        self._advance(group_id, state)
        self._reasons[f"{state}: {reason}"] += 1

    def counts(self) -> dict[str, int]:
        """Return accepted, trained, dropped, quarantined and in_flight; the first is the sum of the others."""
        counts = {
            "accepted": self._num_accepted,
            "trained": self._ended[GroupState.TRAINED],
            "dropped": self._ended[GroupState.DROPPED],
            "quarantined": self._ended[GroupState.QUARANTINED],
            "in_flight": len(self._states),
        }
        total = sum(counts.values()) - counts["accepted"]
        if total != counts["accepted"]:
            raise LedgerError(f"accepted groups must be trained, dropped, quarantined or in flight, got {counts}")
        return counts

    def snapshot(self) -> dict[str, Any]:
        """Return plain data for the checkpoint; it is taken between steps, when nothing is in flight."""
        if self._states:
            raise LedgerError(f"a snapshot must be taken with nothing in flight, got {len(self._states)} groups")
        return {
            "accepted": self._num_accepted,
            "leases": self._num_leases,
            "ended": {str(state): count for state, count in self._ended.items()},
            "reasons": dict(self._reasons),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue from a checkpoint's snapshot."""
        self._states = {}
        self._num_accepted = snapshot["accepted"]
        self._num_leases = snapshot["leases"]
        self._ended = Counter({GroupState(state): count for state, count in snapshot["ended"].items()})
        self._reasons = Counter(snapshot["reasons"])

    def _advance(self, group_id: str, state: GroupState) -> None:
        current = self._states.get(group_id)
        allowed = _NEXT.get(current, set()) | _ENDS if current else set()
        if state not in allowed:
            raise LedgerError(f"group {group_id} cannot go from {current} to {state}")
        if state in _FINAL:
            del self._states[group_id]
            self._ended[state] += 1
        else:
            self._states[group_id] = state
