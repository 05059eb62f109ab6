"""The driver's view of a run while it works: its phases, for the timeline, and what every process does, for `status`.

The loop's verbs say which phase they are; the pipeline says what its workers do.  Either rewrites `processes.json`.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from actors.memory import resident_bytes
from cluster.processes import ProcessStatus, write_processes
from cluster.timeline import Phase, Timeline

_DOES = {
    Phase.LEARN: "learns step {}",
    Phase.PUBLISH: "sends weights {}",
    Phase.CHECKPOINT: "gathers checkpoint {}",
}
"""What the learner's ranks do in a phase."""

_WAITS = {Phase.WAIT: "the batch of step {}", Phase.EVALUATE: "the evaluation of weights {}"}
"""What they wait for."""


class Watch:
    """Used by the driver's thread, but for `workers`, which the pipeline's thread calls.

    Args:
        directory: the run directory.
        num_ranks: of the learner.
    """

    def __init__(self, directory: str, *, num_ranks: int) -> None:
        self.timeline = Timeline()
        self._directory = directory
        self._num_ranks = num_ranks
        self._lock = threading.Lock()
        self._workers: list[ProcessStatus] = []
        self._life = 0
        self._is_learner_up = False
        self._does = self._waits_for = ""
        self._open: tuple[str, str] | None = None
        """The present phase in words, None between two."""
        self._since = time.time()
        self._step = 0
        self._write()  # what an earlier process has left says nothing any more

    @contextmanager
    def phase(self, phase: Phase, step: int) -> Iterator[None]:
        """Say that the block is a phase of a step, or of the version of that number."""
        around, self._open = self._open, (_DOES.get(phase, "").format(step), _WAITS.get(phase, "").format(step))
        self._begin(*self._open)
        try:
            with self.timeline.phase(phase):
                yield
        finally:
            self._open = around
        self._is_learner_up = True
        if phase in (Phase.LEARN, Phase.PUBLISH):
            self._step = step
        if around is not None:
            self._begin(*around)

    def workers(self, processes: Sequence[ProcessStatus]) -> None:
        """Take what the pipeline's workers do now."""
        self._workers = list(processes)
        self._write()

    def learner_lost(self) -> None:
        """Say that the learner's ranks are ended and others start in their place."""
        self._life += 1
        self._is_learner_up = False
        self._begin(self._does, self._waits_for)

    def _begin(self, does: str, waits_for: str) -> None:
        self._does, self._waits_for, self._since = does, waits_for, time.time()
        self._write()

    def _write(self) -> None:
        with self._lock:
            write_processes(self._directory, [self._driver(), *self._ranks(), *self._workers])

    def _driver(self) -> ProcessStatus:
        learner = f"the learner, which {self._does}" if self._does else ""
        return ProcessStatus(
            name="driver",
            state="up",
            does="",
            waits_for=learner or self._waits_for or "its processes to start",
            weights=None,
            since=self._since,
            resident_mb=resident_bytes() / 2**20,
        )

    def _ranks(self) -> list[ProcessStatus]:
        is_up = self._is_learner_up
        return [
            ProcessStatus(
                name=f"learner-{rank}.{self._life}",
                state="up" if is_up else "starting",
                does=self._does if is_up else "",
                waits_for=self._waits_for if is_up else "a place, its peers and its model",
                weights=str(self._step) if is_up else None,
                since=self._since if self._does or not is_up else None,
                resident_mb=None,
            )
            for rank in range(self._num_ranks)
        ]
