"""Metrics of a run, once measured and written everywhere they are looked for.

Journal (`metrics.jsonl`), table (`metrics.parquet`), and the trackers: TensorBoard, Ray (Prometheus), W&B, MLflow.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from cluster.storage import RunStorage
from cluster.timeline import TIMELINE
from cluster.trackers import Trackers

LEADING = (
    "step", "policy_version", "score_mean", "score_std", "kl", "response_length_mean",
    "generate_s", "score_s", "learn_s", "publish_s",
)  # fmt: skip
"""First columns of metrics.parquet; the others follow by name."""

FAULTS = "faults_"
"""First part of the names of counters of what went wrong."""

IDLE = "idle_"
"""First part of the names of shares of a step in which a role's processes had nothing to do: idle_<role>_<reason>."""

RESIDENT = "resident_mb_"
"""First part of the names of a process's main memory, MiB."""

_OF_THE_MACHINE = (FAULTS, IDLE, RESIDENT, TIMELINE, "queue_", "buffer_")


def is_of_the_machine(name: str) -> bool:
    """Return whether a metric says how the machine fared (times, faults, memory), not what was learnt.

    The others are the same in every repetition of a run with the same seed.
    """
    return name.endswith("_s") or name.startswith(_OF_THE_MACHINE)


_JOURNAL = "metrics.jsonl"
_TABLE = "metrics.parquet"


def read_journal(storage: RunStorage) -> list[dict[str, Any]]:
    """Return the rows of a run's journal; a last line that a crash tore is left out."""
    lines = storage.read_text(_JOURNAL).splitlines() if storage.exists(_JOURNAL) else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


class Recorder:
    """Owns a run's metric rows: one a step, and one for step 0 that holds the evaluation before training."""

    def __init__(self, storage: RunStorage, *, last_step: int, trackers: Trackers) -> None:
        """Take back the rows up to `last_step`, a checkpoint's, and forget what came after it.

        Args:
            storage: the run's.
            last_step: of the checkpoint that the run continues from, 0 for none.
            trackers: where else each row is shown; they are closed with the recorder.
        """
        self._storage = storage
        self._trackers = trackers
        self._rows = [row for row in read_journal(storage) if row["step"] <= last_step]
        storage.write_text("".join(json.dumps(row) + "\n" for row in self._rows), _JOURNAL)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return all rows so far, in step order."""
        return self._rows

    def record(
        self, step: int, values: Mapping[str, float], processes: Mapping[str, float] = MappingProxyType({})
    ) -> None:
        """Append one row.

        Args:
            step: whose row it is.
            values: its figures.
            processes: figures of single workers, which trackers may show and no row holds.
        """
        row = {"step": step, **values}
        self._rows.append(row)
        self._storage.append_text(json.dumps(row) + "\n", _JOURNAL)
        self._trackers.record(step, values, processes)

    def compact(self) -> None:
        """Write all rows as one Parquet table; a column that a row does not have is null there."""
        if not self._rows:
            return
        names = {name for row in self._rows for name in row}
        columns = [name for name in LEADING if name in names] + sorted(names.difference(LEADING))
        table = pa.table({name: [row.get(name) for row in self._rows] for name in columns})
        self._storage.write_table(table, _TABLE)

    def close(self) -> None:
        """Write what is buffered."""
        self.compact()
        self._trackers.close()
