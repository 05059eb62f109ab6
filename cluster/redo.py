"""The redo log: what each step learns from is on disk before anybody learns from it.

    rollouts/step-N.parquet     SCORED rows of step N; its schema's metadata says where the batch left the prompts

A learner that went back to a checkpoint learns the steps since then again from here, and a run that continues takes
them from here instead of generating them again.
"""

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa

from actors.schema import SchemaError, check
from cluster.pipeline import Batch
from cluster.storage import RunStorage
from reward.samples import samples_of
from reward.schema import SCORED

_AFTER = b"concord.after"
_DIGEST = b"concord.after.sha256"


class RedoError(RuntimeError):
    """A step's rows cannot be read again; the message names the file and the remedy."""


class RedoLog:
    """Reads and writes the steps' batches in a run directory."""

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage

    def write(self, batch: Batch, rows: pa.Table) -> None:
        """Make a batch durable; what later steps had learnt from is forgotten, because they would now differ.

        Args:
            batch: of one step.
            rows: SCORED, the batch's groups one after another.
        """
        self.discard_after(batch.step)
        after = json.dumps(batch.after).encode()
        metadata = {**SCORED.metadata, _AFTER: after, _DIGEST: _digest(after)}  # Parquet checks the rows, not this
        self._storage.write_table(rows.replace_schema_metadata(metadata), *_parts(batch.step))

    def has(self, step: int) -> bool:
        """Return whether a step's batch has been written."""
        return self._storage.exists(*_parts(step))

    def read(self, step: int) -> Batch:
        """Return a step's batch as it was written, its groups' rows in place of references to them.

        Raises:
            RedoError: when the file is missing or damaged.
        """
        path = "/".join(_parts(step))
        remedy = "continue the run with the same command, which generates the step again"
        if not self.has(step):
            raise RedoError(f"{path} must be there to learn step {step} again, and is not; {remedy}")
        try:
            rows = self._storage.read_table(*_parts(step))
            metadata = check(rows, SCORED, path).schema.metadata or {}
            if _digest(metadata[_AFTER]) != metadata[_DIGEST]:
                raise ValueError("metadata that differs from its digest")
            after: dict[str, Any] = json.loads(metadata[_AFTER])
            rows = rows.cast(SCORED)
        except (OSError, pa.ArrowException, SchemaError, KeyError, ValueError) as error:
            raise RedoError(f"{path} must hold the rows of step {step}, got {error}; {remedy}") from error
        return _batch(step, rows, after)

    def discard_after(self, step: int) -> None:
        """Forget all later steps, the last one first."""
        last = step
        while self.has(last + 1):
            last += 1
        for later in range(last, step, -1):
            self._storage.remove(*_parts(later))


def _digest(after: bytes) -> bytes:
    return hashlib.sha256(after).hexdigest().encode()


def _parts(step: int) -> tuple[str, str]:
    return "rollouts", f"step-{step}.parquet"


def _batch(step: int, rows: pa.Table, after: dict[str, Any]) -> Batch:
    """Cut the rows into groups, e.g. groups a, a, b -> rows 0 to 1 and row 2."""
    identities = np.array(rows["group_id"].to_pylist(), dtype=object)
    starts = [0, *(np.flatnonzero(identities[1:] != identities[:-1]) + 1).tolist()]
    lengths = np.diff([*starts, len(identities)]).tolist()
    return Batch(
        step=step,
        group_ids=tuple(identities[starts].tolist()),
        tables=tuple(rows.slice(start, length) for start, length in zip(starts, lengths, strict=True)),
        samples=samples_of(rows),
        after=after,
    )
