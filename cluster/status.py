"""How a run stands, read from its directory while it works and after it; `status_page.py` shows it.

The history in `ledger.sqlite` is a help and not a need: without it the counts are those of the last metrics row and of
the redo log.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.parquet as pq
import yaml

from cluster.ledger import FINAL, GroupState
from cluster.ledger_history import Event, InFlight, LedgerHistory, reading
from cluster.metrics import FAULTS, IDLE, RESIDENT, read_journal
from cluster.processes import PROCESSES_FILE, ProcessStatus, read_processes
from cluster.remote_storage import open_storage
from cluster.storage import RunStorage, StorageError

LEDGER_FILE = "ledger.sqlite"
"""The ledger's history in a run directory, see `ledger_store.py`."""

_HEADLINES = ("score_mean", "eval_score_mean", "kl", "eval_kl", "response_length_mean", "tokens_per_s", "step_s")
MAX_SHOWN = 10
"""Groups named in a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatus:
    """A group in flight, or one that was dropped or quarantined; None is what is not known of it."""

    group_id: str
    state: GroupState
    worker: str | None
    lease_id: int | None
    lease_age_s: float | None
    weights: str | None
    step: int | None
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCounts:
    """Where the groups are; `accepted` is the sum of the others, of which some are `durable` in a checkpoint."""

    source: str
    """The file that says so."""
    accepted: int
    trained: int
    dropped: int
    quarantined: int
    in_flight: int
    durable: int | None
    """Trained groups in the newest checkpoint; None where nobody has counted them."""

    @property
    def is_conserved(self) -> bool:
        """Whether each accepted group is somewhere, once."""
        return self.accepted == self.trained + self.dropped + self.quarantined + self.in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """How a run stands."""

    directory: str
    process: str | None
    """Id of the process that writes to the directory; None where none does."""
    step: int
    num_steps: int
    checkpoint: int | None
    """Step of the newest one."""
    damaged_checkpoints: tuple[str, ...]
    logged_steps: tuple[int, ...]
    """First and last step in the redo log; empty where it is."""
    groups: GroupCounts
    is_conserved: bool
    in_flight: tuple[GroupStatus, ...]
    ended: tuple[GroupStatus, ...]
    """The first groups that were quarantined, then the first that were dropped."""
    reasons: dict[str, int]
    num_malformed_rows: int
    faults: dict[str, float]
    figures: dict[str, float | None]
    """Of the newest step; None where a number is not finite."""
    idle: dict[str, float]
    """Role_reason -> share of the newest step, as `idle_` metrics say."""
    resident_mb: dict[str, float]
    """Process -> main memory at the newest step, MiB."""
    at: float
    """When it was looked at, Unix time, seconds."""
    processes: tuple[ProcessStatus, ...]
    """What each process does; empty where the run does not work."""
    notes: tuple[str, ...]


def run_status(run_dir: str, *, now: float) -> RunStatus:
    """Return how a run stands.

    Args:
        run_dir: its directory.
        now: Unix time, seconds.
    """
    storage = open_storage(run_dir)
    rows = _metrics(storage)
    last = rows[-1] if rows else {}
    steps = storage.checkpoints()
    checkpoint = steps[-1] if steps else None
    logged = _logged_steps(storage)
    ledger = _ledger(storage, rows, checkpoint, logged, now=now)
    return RunStatus(
        directory=storage.shown(),
        process=storage.holder(),
        step=int(last.get("step", 0)),
        num_steps=yaml.safe_load(storage.read_text("config.yaml"))["run"]["num_steps"],
        checkpoint=checkpoint,
        damaged_checkpoints=tuple(storage.damaged_checkpoints()),
        logged_steps=(logged[0], logged[-1]) if logged else (),
        groups=ledger.counts,
        is_conserved=ledger.counts.is_conserved,
        in_flight=ledger.in_flight,
        ended=ledger.ended,
        reasons=ledger.reasons,
        num_malformed_rows=_summary(storage).get("num_quarantined_rows", 0),
        faults=_named(last, FAULTS),
        figures=_figures(rows),
        idle=_named(last, IDLE),
        resident_mb=_named(last, RESIDENT),
        at=now,
        processes=_processes(storage),
        notes=ledger.notes,
    )


def _processes(storage: RunStorage) -> tuple[ProcessStatus, ...]:
    """Return the newest view of a run that works; one that has ended has left its last."""
    if storage.holder() is None:
        return ()
    return read_processes(os.path.dirname(storage.path(PROCESSES_FILE))) or ()


def _named(row: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}


def status_json(status: RunStatus) -> str:
    """Return the status as one JSON object, plain ASCII."""
    return json.dumps(asdict(status), indent=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ledger:
    counts: GroupCounts
    in_flight: tuple[GroupStatus, ...]
    ended: tuple[GroupStatus, ...]
    reasons: dict[str, int]
    notes: tuple[str, ...]


def _ledger(
    storage: RunStorage, rows: Sequence[dict[str, Any]], checkpoint: int | None, logged: Sequence[int], *, now: float
) -> _Ledger:
    path = storage.path(LEDGER_FILE)
    last = rows[-1] if rows else {}
    measured = _measured(last, next((row for row in rows if row["step"] == checkpoint), None))
    if os.path.isfile(path):
        try:
            with reading(path) as history:
                return _from_history(history, measured, checkpoint, now=now)
        except StorageError as error:
            notes: tuple[str, ...] = (str(error),)
    else:
        notes = (f"there is no {LEDGER_FILE}: groups are as of the last metrics row",)
    in_flight = _batched(storage, [step for step in logged if step > last.get("step", 0)])
    num_new = max(0, len(in_flight) - measured.in_flight)
    return _Ledger(
        counts=replace(measured, accepted=measured.accepted + num_new, in_flight=measured.in_flight + num_new),
        in_flight=in_flight,
        ended=(),
        reasons=_saved_reasons(storage, checkpoint),
        notes=notes,
    )


def _from_history(history: LedgerHistory, measured: GroupCounts, checkpoint: int | None, *, now: float) -> _Ledger:
    durable = history.num_trained(up_to_step=checkpoint or 0)
    counts = GroupCounts(source=LEDGER_FILE, durable=durable, **history.counts())
    notes: tuple[str, ...] = ()
    if counts.accepted < measured.accepted:
        notes = (f"{LEDGER_FILE} was begun again and knows {counts.accepted} of {measured.accepted} groups",)
        counts = measured
    # Dynamic sampling drops groups as a matter of course; those that somebody has to look at come first.
    states = (GroupState.QUARANTINED, GroupState.DROPPED)
    ended = [event for state in states for event in history.ended(state, limit=MAX_SHOWN)]
    return _Ledger(
        counts=counts,
        in_flight=tuple(_in_flight(group, now) for group in history.groups_in_flight()),
        ended=tuple(_group(event, lease_age_s=None) for event in ended),
        reasons={f"{state}: {reason}": count for state, reason, count in history.reasons()},
        notes=notes,
    )


def _in_flight(group: InFlight, now: float) -> GroupStatus:
    return _group(group.event, lease_age_s=None if group.leased_at is None else now - group.leased_at)


def _group(event: Event, *, lease_age_s: float | None) -> GroupStatus:
    group = event.transition
    return GroupStatus(
        group_id=group.group_id,
        state=group.state,
        worker=group.worker,
        lease_id=group.lease_id,
        lease_age_s=lease_age_s,
        weights=weights_of(event),
        step=group.step,
        reason=group.reason,
    )


def _batched(storage: RunStorage, steps: Iterable[int]) -> tuple[GroupStatus, ...]:
    """Return the groups that the redo log holds of steps."""
    return tuple(
        GroupStatus(
            group_id=group_id,
            state=GroupState.BATCHED,
            worker=None,
            lease_id=lease_id,
            lease_age_s=None,
            weights=None,
            step=step,
            reason=None,
        )
        for step in steps
        for group_id, lease_id in sorted(_logged_leases(storage, step).items())
    )


def _logged_leases(storage: RunStorage, step: int) -> dict[str, int]:
    path = storage.path("rollouts", f"step-{step}.parquet")
    table = pq.read_table(path, columns=["group_id", "lease_id"])
    return dict(zip(table["group_id"].to_pylist(), table["lease_id"].to_pylist(), strict=True))


def _measured(row: dict[str, Any], saved: dict[str, Any] | None) -> GroupCounts:
    """Return the counts of a metrics row, durable those of the checkpoint's."""
    counts = {name: int(row.get(f"groups_{name}", 0)) for name in ("accepted", *map(str, FINAL), "in_flight")}
    durable = None if saved is None else int(saved.get("groups_trained", 0))
    return GroupCounts(source="metrics.jsonl", durable=durable, **counts)


def _saved_reasons(storage: RunStorage, checkpoint: int | None) -> dict[str, int]:
    if checkpoint is None or not storage.exists(*(parts := (storage.checkpoint(checkpoint), "run.json"))):
        return {}
    reasons: dict[str, int] = json.loads(storage.read_text(*parts))["pipeline"]["ledger"]["reasons"]
    return reasons


def _metrics(storage: RunStorage) -> list[dict[str, Any]]:
    rows = read_journal(storage)
    if not rows and storage.exists("metrics.parquet"):
        table = storage.read_table("metrics.parquet").to_pylist()
        rows = [{name: value for name, value in row.items() if value is not None} for row in table]
    return rows


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    newest = {name: row[name] for row in rows for name in _HEADLINES if name in row}
    return {name: newest[name] if math.isfinite(newest[name]) else None for name in _HEADLINES if name in newest}


def _summary(storage: RunStorage) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(storage.read_text("summary.json")) if storage.exists("summary.json") else {}
    return summary


def _logged_steps(storage: RunStorage) -> tuple[int, ...]:
    found = (re.fullmatch(r"step-(\d+)\.parquet", name) for name in storage.names("rollouts"))
    return tuple(sorted(int(match.group(1)) for match in found if match))


def weights_of(event: Event) -> str | None:
    """Return the weights of an event's lease, as they are named to a person."""
    group = event.transition
    if group.version is None:
        return None
    return f"{group.version}" + (f" (incarnation {group.incarnation})" if group.incarnation else "")
