"""`concord status` and `concord ledger` on the terminal.

Text from data sets and errors is shown as text: no markup, control characters escaped.
"""

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from cluster.config import ConfigError
from cluster.ledger import GroupState
from cluster.ledger_history import Event, LedgerHistory, reading
from cluster.remote_storage import open_storage
from cluster.status import LEDGER_FILE, MAX_SHOWN, RunStatus, weights_of

MAX_PROCESSES_SHOWN = 40
"""Processes in the table; `--json` has all."""


def render_status(status: RunStatus) -> RenderableType:
    """Return the status for the terminal."""
    overview = _table("", "", title=f"status of {status.directory}")
    overview.show_header = False
    for name, value in _overview(status):
        _add_row(overview, name, value)
    parts: list[RenderableType] = [overview]
    if status.processes:
        parts.append(_processes(status))
    if status.in_flight:
        names = ("group", "state", "worker", "lease", "lease age", "weights", "step")
        table = _table(*names, title=_titled("groups in flight", status.in_flight, status.groups.in_flight))
        for group in status.in_flight[:MAX_SHOWN]:
            age = _seconds(group.lease_age_s)
            _add_row(table, group.group_id, group.state, group.worker, group.lease_id, age, group.weights, group.step)
        parts.append(table)
    if status.ended:
        total = status.groups.dropped + status.groups.quarantined
        table = _table("group", "state", "step", "reason", title=_titled("groups not trained", status.ended, total))
        for group in status.ended[:MAX_SHOWN]:
            _add_row(table, group.group_id, group.state, group.step, group.reason)
        parts.append(table)
    return Group(*parts, *(Text(shown(f"note: {note}")) for note in status.notes))


def render_ledger(status: RunStatus) -> RenderableType:
    """Return the counts of a run's ledger and the reasons for which groups were not trained."""
    counts = _table("groups", "count", title=f"ledger of {status.directory} ({status.groups.source})")
    for name in ("accepted", "trained", "dropped", "quarantined", "in_flight"):
        _add_row(counts, name.replace("_", " "), getattr(status.groups, name))
    _add_row(counts, "trained and in a checkpoint", status.groups.durable)
    _add_row(counts, "accepted = sum of the others", _yes(status.is_conserved))
    reasons = _table("reason", "groups")
    for reason, count in status.reasons.items():
        _add_row(reasons, reason, count)
    shown_reasons = [reasons] if status.reasons else []
    return Group(counts, *shown_reasons, *(Text(shown(f"note: {note}")) for note in status.notes))


def render_history(run_dir: str, name: str) -> RenderableType:
    """Return each transition of a group, or of all groups of a prompt, for the terminal.

    Raises:
        ConfigError: when the run knows no such prompt or group, or keeps no history.
    """
    storage = open_storage(run_dir)
    path = storage.path(LEDGER_FILE)
    if not os.path.isfile(path):
        raise ConfigError(
            f"{storage.shown()} must hold {LEDGER_FILE} to explain a group, and does not; `concord status` needs none"
        )
    steps = storage.checkpoints()
    with reading(path) as history:
        events = history.history(name)
        if not events:
            raise ConfigError(_unknown(history, name))
    groups = dict.fromkeys(event.transition.group_id for event in events)
    return Group(*(_history(group, events, steps[-1] if steps else 0) for group in groups))


def shown(text: str) -> str:
    r"""Return text with everything that a terminal would act on or hide escaped, an escape character as \x1b."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _processes(status: RunStatus) -> Table:
    """Return who does what; the age is that of the oldest lease, or of whatever else the process was asked."""
    names = ("process", "state", "does", "weights", "lease age", "memory")
    table = _table(*names, title=_titled("processes", status.processes, len(status.processes), MAX_PROCESSES_SHOWN))
    # Those that somebody may have to look at come first.
    for process in sorted(status.processes, key=lambda process: process.state == "up")[:MAX_PROCESSES_SHOWN]:
        age = None if process.since is None else _seconds(status.at - process.since)
        memory = None if process.resident_mb is None else f"{process.resident_mb:.0f} MiB"
        does = process.does or (f"waits for {process.waits_for}" if process.waits_for else "")
        _add_row(table, process.name, process.state, does, process.weights, age, memory)
    return table


def _overview(status: RunStatus) -> list[tuple[str, str]]:
    groups, logged = status.groups, status.logged_steps
    in_flight = Counter(group.state for group in status.in_flight)
    durable = "" if groups.durable is None else f" ({groups.durable} in a checkpoint)"
    checkpoint = "none yet" if status.checkpoint is None else f"step {status.checkpoint}"
    damaged = f", damaged: {', '.join(status.damaged_checkpoints)}" if status.damaged_checkpoints else ""
    figures = (f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in status.figures.items())
    return [
        ("run", f"running, process {status.process}" if status.process else "not running"),
        ("step", f"{status.step} of {status.num_steps}"),
        ("newest checkpoint", checkpoint + damaged),
        ("redo log", f"steps {logged[0]} to {logged[-1]}" if logged else "empty"),
        (
            "groups",
            f"{groups.accepted} accepted = {groups.trained} trained{durable} + {groups.dropped} dropped + "
            f"{groups.quarantined} quarantined + {groups.in_flight} in flight",
        ),
        ("in flight", ", ".join(f"{count} {state}" for state, count in in_flight.items()) or "none"),
        ("accounts add up", f"{_yes(status.is_conserved)} (as {groups.source} counts)"),
        ("malformed rows", str(status.num_malformed_rows)),
        ("faults", ", ".join(f"{name} {value:g}" for name, value in status.faults.items() if value) or "none recorded"),
        ("newest figures", ", ".join(figures) or "none yet"),
        ("idle in that step", _idle(status.idle) or "not known"),
        ("memory", ", ".join(f"{name} {size:.0f} MiB" for name, size in status.resident_mb.items()) or "not known"),
    ]


def _idle(shares: dict[str, float]) -> str:
    """Return e.g. `rollout 31% for learner, 2% for weights; learner 5% for rollouts`."""
    by_role: dict[str, list[str]] = {}
    for name, share in shares.items():
        role, _, reason = name.partition("_")
        if reason != "max" and share >= 0.005:
            by_role.setdefault(role, []).append(f"{share:.0%} for {reason}")
    return "; ".join(f"{role} {', '.join(reasons)}" for role, reasons in by_role.items())


def _history(group_id: str, events: Sequence[Event], checkpoint: int) -> Table:
    table = _table("time", "state", "worker", "lease", "weights", "step", "note", title=f"group {group_id}")
    for event in events:
        group = event.transition
        if group.group_id == group_id:
            time = datetime.fromtimestamp(event.at).strftime("%Y-%m-%d %H:%M:%S")
            _add_row(
                table, time, group.state, group.worker, group.lease_id, weights_of(event), group.step,
                _note(event, checkpoint),
            )  # fmt: skip
    return table


def _note(event: Event, checkpoint: int) -> str:
    group = event.transition
    if event.rolled_back is not None:
        return f"rolled back by the resume after step {event.rolled_back}"
    if group.state is GroupState.TRAINED and group.step is not None:
        if group.step <= checkpoint:
            return f"durable: the checkpoint of step {checkpoint} holds it"
        return f"not durable yet: no checkpoint of step {group.step} or later"
    if group.state is GroupState.BATCHED and group.worker is None:
        return "its judged rows were read from the redo log"
    return group.reason or ""


def _unknown(history: LedgerHistory, name: str) -> str:
    near = difflib.get_close_matches(name, history.prompts_near(name), n=3, cutoff=0.5)
    names = ", ".join(shown(each) for each in near)
    hint = f"did you mean {names}?" if near else "`concord status` names groups in flight and groups not trained"
    return f"--why must name a prompt or a group that the run has accepted, got {shown(name)}; {hint}"


def _titled(name: str, listed: Sequence[object], total: int, limit: int = MAX_SHOWN) -> str:
    count = min(len(listed), limit)
    return f"{name} ({total})" if count >= total else f"{name} ({count} of {total})"


def _table(*names: str, title: str = "") -> Table:
    columns = (Column(name, overflow="fold") for name in names)
    return Table(*columns, title=Text(shown(title)) if title else None, title_justify="left")


def _add_row(table: Table, *values: object) -> None:
    table.add_row(*(Text("" if value is None else shown(str(value))) for value in values))


def _yes(fact: bool) -> str:
    return "yes" if fact else "NO"


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{max(0.0, seconds):.1f} s"
