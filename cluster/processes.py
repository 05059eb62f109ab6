"""What each process of a run does at this moment, or waits for: made by the run, read by `concord status`.

`processes.json` in the run directory holds the newest view.  It is a help and not a need: it is not synced, nothing is
decided by it, and a disk that does not take it disturbs nobody.
"""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cluster.fleet import Member, MemberState
from cluster.messages import Role, Verb, Weights
from cluster.registry import PROCESS
from cluster.usage import Activity, activity_of

if TYPE_CHECKING:
    from cluster.dispatcher import Dispatcher

PROCESSES_FILE = "processes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """One process."""

    name: str
    """E.g. rollout-1.2: the third process of slot 1."""
    state: str
    """down, starting, up, given up."""
    does: str
    """E.g. `generates 3 groups`; empty where it does nothing."""
    waits_for: str
    """Empty where it does something."""
    weights: str | None
    """The policy version it has; None for judges, and where it has none yet."""
    since: float | None
    """When its oldest call was sent, for a rollout worker its oldest lease; Unix time, seconds; None = it owes none."""
    resident_mb: float | None
    """Main memory when it was last asked, MiB."""


_FIELDS = tuple(field.name for field in fields(ProcessStatus))

_ASIDE = (Verb.PING, Verb.STATS)
"""Calls that are no work."""

_REASONS = {
    Activity.LEARNER: "the learner",
    Activity.BUFFER: "room in the buffer",
    Activity.ROLLOUTS: "rollouts",
}
"""What an idle worker's fleet waits for, in words."""


def worker_processes(dispatcher: "Dispatcher", now: float) -> list[ProcessStatus]:
    """Return all rollout and reward workers.

    Args:
        dispatcher: theirs.
        now: seconds, by the dispatcher's clock.
    """
    offset = time.time() - now
    found = []
    for role, fleet in dispatcher.fleets.items():
        target = dispatcher.distribution.target if role is Role.ROLLOUT else None
        for member in fleet.members:
            if member.state is MemberState.ABSENT:
                continue
            calls = [pending for pending in dispatcher.calls.of(member.worker) if pending.call.verb not in _ASIDE]
            does = _does(member, {pending.call.verb for pending in calls})
            stats = dispatcher.stats.get(member.worker)
            found.append(
                ProcessStatus(
                    name=str(member.worker),
                    state=str(member.state),
                    does=does,
                    waits_for="" if does else _waits_for(member, target, dispatcher.usage.reason(role), now),
                    weights=None if member.weights is None else str(member.weights),
                    since=calls[0].sent_at + offset if calls else None,
                    resident_mb=None if stats is None else stats["resident_bytes"] / 2**20,
                )
            )
    return found


def process_figures(dispatcher: "Dispatcher") -> dict[str, float]:
    """Return what each worker said of itself last, and how busy it was; named as `registry.PROCESS` says."""
    figures = {f"{PROCESS}{role}_{slot}_busy_share": share for (role, slot), share in dispatcher.usage.busy.items()}
    for worker, stats in dispatcher.stats.items():
        figures |= {f"{PROCESS}{worker.role}_{worker.slot}_{name}": value for name, value in stats.items()}
    return figures


def _does(member: Member, verbs: set[Verb]) -> str:
    groups = f"{member.num_groups} group{'s' if member.num_groups != 1 else ''}"
    parts = []
    if member.num_groups:
        parts.append(f"{'generates' if member.worker.role is Role.ROLLOUT else 'judges'} {groups}")
    if member.loading is not None:
        parts.append(f"takes on weights {member.loading}")
    if Verb.SLEEP in verbs:
        parts.append("gives its memory back")
    return ", ".join(parts)


def _waits_for(member: Member, target: Weights | None, reason: Activity, now: float) -> str:
    match member.state:
        case MemberState.STARTING:
            return "a place, and its model"
        case MemberState.DOWN:
            return f"its next start, in {max(0.0, member.start_at - now):.1f} s"
        case MemberState.GIVEN_UP:
            return ""
    if member.load_failure:
        return f"other weights, since it could not take these: {member.load_failure}"
    if activity_of(member, target) is Activity.WEIGHTS:
        return f"weights {target}"
    return _REASONS[reason]


def write_processes(directory: str, processes: Sequence[ProcessStatus]) -> None:
    """Put the view in its place, whole; what the disk refuses is left out."""
    path = os.path.join(directory, PROCESSES_FILE)
    rows = [{name: getattr(process, name) for name in _FIELDS} for process in processes]
    with suppress(OSError):
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(json.dumps({"processes": rows}))
        os.replace(f"{path}.new", path)


def read_processes(directory: str) -> tuple[ProcessStatus, ...] | None:
    """Return the newest view; None where there is none that can be read."""
    try:
        with open(os.path.join(directory, PROCESSES_FILE), encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
        return tuple(ProcessStatus(**process) for process in found["processes"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
