"""When a step's phases began and how long they took: figures of the step's row, drawn by the report.

    timeline_started_at       when the step began, Unix time, seconds
    timeline_learn_from_s     when it began to learn, seconds after that
    timeline_learn_for_s      how long it learnt, seconds

A phase may begin before its step: rollouts that are generated ahead, and the checkpoint of the step before.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.groups import Batch

TIMELINE = "timeline_"
"""First part of the names of a timeline's figures; no curves are drawn of them."""

STARTED_AT = f"{TIMELINE}started_at"


class Phase(StrEnum):
    """What goes on: the first two in the workers, the others in the driver and the learner's ranks."""

    GENERATE = "generate"
    SCORE = "score"
    WAIT = "wait"
    LEARN = "learn"
    PUBLISH = "publish"
    EVALUATE = "evaluate"
    CHECKPOINT = "checkpoint"


def span_of(phase: Phase) -> tuple[str, str]:
    """Return the names of the two figures of a phase."""
    return f"{TIMELINE}{phase}_from_s", f"{TIMELINE}{phase}_for_s"


class Timeline:
    """Notes the driver's phases until they are taken into a step's row.

    A phase that comes twice in a step is one that begins with the first and lasts as long as both.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spans: dict[Phase, tuple[float, float]] = {}
        """Phase -> when it began first, and how long it lasted in all."""

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Note that the block is a phase, also where it fails."""
        started = self._clock()
        try:
            yield
        finally:
            first, length = self._spans.get(phase, (started, 0.0))
            self._spans[phase] = first, length + self._clock() - started

    def take(self, step_started: float, batch: "Batch") -> dict[str, float]:
        """Return the figures of what was noted since the last call, and of how the batch was made.

        Args:
            step_started: when the step began, by the clock.
            batch: the step's.
        """
        spans, self._spans = self._spans, {}
        if batch.finished_at is not None:
            scored_from = batch.finished_at - batch.score_s
            spans[Phase.GENERATE] = scored_from - batch.generate_s, batch.generate_s
            spans[Phase.SCORE] = scored_from, batch.score_s
        figures = {STARTED_AT: time.time() - (self._clock() - step_started)}
        for phase, (first, length) in spans.items():
            begin, duration = span_of(phase)
            figures |= {begin: first - step_started, duration: length}
        return figures
