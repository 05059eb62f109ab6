"""Rollout and reward workers that sleep where the real ones compute, with answers of realistic sizes.

Imports little, so that a process of it is there in half a second; it travels to the processes by value.
"""

import asyncio
import time
from typing import Any

import pyarrow as pa


class StubRolloutWorker:
    """Has a rollout worker's verbs and answers.

    Args:
        rows: ROLLOUTS of one group.
        seconds: to generate it.
    """

    def __init__(self, *, rows: pa.Table, seconds: float) -> None:
        self._rows = rows
        self._seconds = seconds

    async def generate(self, stream: bytes, lease: Any) -> tuple[pa.Table, dict[str, float]]:
        """Return the group after a while."""
        prompt = pa.ipc.open_stream(stream).read_all()
        assert (prompt.num_rows, lease.num_samples) == (1, self._rows.num_rows), "a lease is one prompt's group"
        await asyncio.sleep(self._seconds)
        numbers = {"num_tokens": 2048, "num_bytes": self._rows.nbytes, "generate_s": self._seconds}
        return self._rows, numbers

    async def update_weights(self, publication: Any) -> float:
        """Take nothing."""
        return 0.0

    async def ping(self) -> int:
        """Return a version."""
        return 0

    async def stats(self) -> dict[str, float]:
        """Return a counter."""
        return {"resident_bytes": 0.0}


class StubRewardWorker:
    """Has a reward worker's verbs and answers.

    Args:
        scored: SCORED of one group.
        samples: SAMPLES of it.
        seconds: to judge it.
    """

    def __init__(self, *, scored: pa.Table, samples: pa.Table, seconds: float) -> None:
        self._scored = scored
        self._samples = samples
        self._seconds = seconds

    def ping(self) -> str:
        """Return as soon as the worker is ready."""
        return "ready"

    def stats(self) -> dict[str, float]:
        """Return a counter."""
        return {"resident_bytes": 0.0}

    def score(self, rollouts: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return the group after a while, under the name it came with."""
        time.sleep(self._seconds)
        names = pa.array([self._name(rollouts)] * self._samples.num_rows, pa.string())
        return self._scored, self._samples.set_column(0, self._samples.schema.field(0), names)

    def _name(self, rollouts: pa.Table) -> str:
        return str(rollouts["group_id"][0].as_py())
