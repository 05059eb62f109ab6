"""A training run: a session with a directory of its own, and the verbs of the loop (`loop.py`)."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from actors.memory import resident_bytes
from cluster.claim import claim
from cluster.distribution import WeightsLostError, WeightsWantedError
from cluster.gauges import RayGauges
from cluster.incarnations import DurableIncarnations
from cluster.interrupt import StopRequest
from cluster.ledger import LedgerJournal
from cluster.ledger_store import LedgerStore
from cluster.metrics import FAULTS, Recorder
from cluster.pipeline import Batch
from cluster.pool import WorkerError
from cluster.recovery import StepResult
from cluster.redo import RedoError
from cluster.session import STATE_FILE, Session
from cluster.status import LEDGER_FILE
from cluster.storage import StorageError
from cluster.timeline import Phase
from cluster.trackers import TensorBoard, Trackers, make_tracker
from cluster.usage import learner_idle
from cluster.watch import Watch

NON_FINITE = "non_finite"
"""Why the groups of a skipped step are dropped."""

Answer = TypeVar("Answer")


class Stopped(KeyboardInterrupt):
    """A stop was requested, and the run is at the end of a step."""


class Run(Session):
    """A session that trains and keeps records.  Leaving it ends every process and closes the directory.

    Leaving it without an error completes the checkpoint under way; because of `Stopped`, saves the last finished step.
    """

    recorder: Recorder
    watch: Watch
    stop: StopRequest
    _step_started: float
    _waited_s: float
    _evaluated: dict[str, float]

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[1] is None:
                self._finish_checkpoint()
            elif isinstance(exception[1], Stopped):
                self.save_stopped()
        finally:
            self.close()

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, the first one after the last checkpoint.

        Raises:
            Stopped: between two steps, when a stop is requested.
        """
        with self.display.training(self.step, self.config.run.num_steps):
            while self.step < self.config.run.num_steps:
                if self.stop.requested:
                    raise Stopped
                self._step_started = time.monotonic()
                yield self.step + 1

    def take_batch(self, step: int) -> Batch:
        """Return the step's judged groups, already on disk: what the learner sees can always be read again.

        A step that is on disk from before, because the run stopped after it was judged, is not generated again.

        Raises:
            Stopped: when a stop is requested while it waits.
            WorkerError: when rows were lost before they were on disk.
        """
        started = time.perf_counter()
        self._waited_s = 0.0
        if self.redo.has(step) and (batch := self._from_redo_log(step)) is not None:
            return batch
        with self.watch.phase(Phase.WAIT, step):
            batch = self._asking(lambda: self._wait_for_batch(step), version=step - 1)
        self._waited_s = time.perf_counter() - started
        oldest = pc.min(batch.samples["oldest_version"]).as_py()
        assert oldest >= step - 1 - self.config.pipeline.max_staleness, f"step {step} was given version {oldest}"
        self.redo.write(batch, self._rows(batch))
        return batch

    def learn(self, batch: Batch) -> StepResult:
        """Train on a batch; the checkpoint that the ranks have been writing meanwhile is completed before."""
        with self.watch.phase(Phase.LEARN, batch.step):
            self.give_turn("learner")
            self._finish_checkpoint()
            return self.learner.step(batch)

    def publish(self, version: int) -> None:
        """Give the learner's weights to every rollout worker as `version`."""
        with self.watch.phase(Phase.PUBLISH, version):
            super().publish(version)

    def evaluate_start(self) -> None:
        """Evaluate the policy before training; a resumed run has done so."""
        if self.step == 0 and not self.recorder.rows and self.held_out:
            with self.stop.interruptible():
                row = self.evaluate(0)
            self.recorder.record(0, {"policy_version": 0, **row})
            self.display.step({"step": 0, **row}, self.config.run.num_steps)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate every `evaluation.every` steps and after the last one."""
        due = step % self.config.evaluation.every == 0 or step == self.config.run.num_steps
        self._evaluated = self.evaluate(step) if due and self.held_out else {}

    def evaluate(self, version: int) -> dict[str, float]:
        """Evaluate the current policy and keep its answers in the run directory."""
        with self.watch.phase(Phase.EVALUATE, version):
            batch, metrics = self._asking(lambda: self.answer_held_out(version), version=version)
        self.storage.write_table(self.tables(batch), "evaluation", f"step-{version}.parquet")
        return metrics

    def record(self, step: int, batch: Batch, result: StepResult) -> dict[str, float]:
        """Account for a step: ledger, metrics row, progress."""
        self._counts = self.pipeline.settle(batch, dropped=None if result.skipped is None else NON_FINITE)
        self._state = self.pipeline.state_dict()
        self._is_skipped = result.skipped is not None
        step_s = time.monotonic() - self._step_started
        metrics = {
            "policy_version": step,
            **result.metrics,
            **self._evaluated,
            **batch.metrics,
            "generate_s": batch.generate_s,
            "score_s": batch.score_s,
            "publish_s": self.publish_s,
            "step_s": step_s,
            **self.pipeline.usage(),
            **learner_idle(step_s, waited_s=self._waited_s, publish_s=self.publish_s),
            "resident_mb_driver": resident_bytes() / 2**20,
            **self.watch.timeline.take(self._step_started, batch),
            **{f"groups_{name}": count for name, count in self._counts.items()},
            **{f"{FAULTS}{name}": count for name, count in self._fault_counts().items()},
        }
        if result.skipped is None:
            metrics["tokens_per_s"] = metrics["num_tokens"] / metrics["step_s"]
        else:
            self.display.say(f"step {step} is skipped, its groups are dropped: {result.skipped.reason}")
        self.recorder.record(step, metrics, self.pipeline.process_figures())
        self.display.step({"step": step, **metrics}, self.config.run.num_steps)
        self.step = step
        return metrics

    def checkpoint_if_due(self, step: int) -> None:
        """Begin to save resumable state every `run.checkpoint_every` steps and after the last one.

        Never right after a skipped step, unless it is the last one: if more are skipped, the run ends, and its newest
        checkpoint is from before.
        """
        is_due = step % self.config.run.checkpoint_every == 0 and not self._is_skipped
        if is_due or step == self.config.run.num_steps:
            with self.watch.phase(Phase.CHECKPOINT, step):
                self._tolerating(self._begin_checkpoint)

    def finish(self) -> None:
        """Export the policy after the last step, once that step's checkpoint is whole.

        Raises:
            OSError: when one of them cannot be written.
        """
        self._finish_checkpoint()
        self._save()
        self.learner.export(self.storage.address("policy"))
        self._save()  # once more where ranks that died over the export found it damaged

    def save(self) -> None:
        """Save the last finished step now, unless its checkpoint is whole already.

        Never after a skipped step, nor in the middle of one: the checkpoint before it and the redo log hold everything.

        Raises:
            OSError: when it cannot be written.
        """
        self._finish_checkpoint()
        if self.learner.step_done != self.step:
            self.display.say(f"step {self.step + 1} is not finished and not saved; the same command learns it again")
        elif not self._is_skipped:
            self._save()

    def save_stopped(self) -> None:
        """Save the last finished step because of a stop request, and say how to go on."""
        self.save()
        self.display.say(f"stopped after step {self.step}; the same command continues the run")

    def _asking(self, ask: Callable[[], Answer], *, version: int) -> Answer:
        """Ask the pipeline; weights that were lost with the rank that held them are published again."""
        if self._published is None or self.learner.incarnation != self._published.incarnation:
            self.give_turn("learner")
            self.publish(version)  # ranks that were started again may differ in a last bit, and hold what was published
        num_lost = 0
        while True:
            self.give_turn("rollouts")
            try:
                return ask()
            except WeightsWantedError:  # a worker that was started again catches up alone
                self._announce(version)
            except WeightsLostError as error:
                num_lost += 1
                if num_lost > self.config.pipeline.max_restarts:
                    raise
                self._num_lost_publications += 1
                self.display.say(f"version {version} of the weights is published again: {error}")
                self.give_turn("learner")
                self.learner.check()
                self._announce(version)

    def _wait_for_batch(self, step: int) -> Batch:
        try:
            with self.stop.interruptible():
                return self.pipeline.take_batch(step)
        except KeyboardInterrupt:
            raise Stopped from None

    def _rows(self, batch: Batch) -> pa.Table:
        try:
            return self.tables(batch)
        except WorkerError as error:
            raise WorkerError(
                f"the rows of step {batch.step} must be on disk before they are learnt from, and were lost on the way: "
                f"{error}; continue the run with the same command, which generates the step again and loses nothing"
            ) from error

    def _from_redo_log(self, step: int) -> Batch | None:
        try:
            batch = self.redo.read(step)
        except RedoError as error:
            self.display.say(f"step {step} is generated again: {error}")
            return None
        self.pipeline.replay_batch(batch)
        return batch

    def _fault_counts(self) -> dict[str, int]:
        return {
            **self.pipeline.fault_counts(),
            "num_learner_restarts": self.learner.num_restarts,
            "num_replayed_steps": self.learner.num_replayed,
            "num_lost_publications": self._num_lost_publications,
            "num_broken_streams": self.num_broken_streams,
            "num_failed_checkpoints": self._num_failed_checkpoints,
            "num_failed_ledger_writes": self._store.num_failed_writes,
            "num_lost_ledger_transitions": self._store.num_lost,
            "num_failed_trackers": self._trackers.num_failed,
            **self.storage.fault_counts(),
        }

    def _begin_checkpoint(self) -> None:
        self.give_turn("learner")
        assert self.learner.step_done == self.step, "the step that the ranks are at must be recorded before it is saved"
        state = {"step": self.step, "model_dir": self._model_dir, "pipeline": self._state}
        self.learner.begin_checkpoint({STATE_FILE: json.dumps(state)})

    def _complete_checkpoint(self) -> None:
        self.give_turn("learner")  # ranks that died while they wrote learn again now
        step = self.learner.finish_checkpoint()
        if step is not None:
            self._saved = step
            self._tidy_up(step)

    def _tidy_up(self, step: int) -> None:
        """Do what may follow a checkpoint; the next one does it again."""
        try:
            self.storage.keep_checkpoints(self.config.run.keep_checkpoints)
            self.recorder.compact()
        except OSError as error:
            self.display.say(
                f"checkpoint {step} is whole, but older ones or metrics.parquet are not tidied up: {error}"
            )

    def _finish_checkpoint(self) -> None:
        self._tolerating(self._complete_checkpoint)

    def _tolerating(self, save: Callable[[], None]) -> None:
        """Go on where a checkpoint cannot be written: the one before it and the redo log hold everything."""
        try:
            save()
        except OSError as error:
            self._num_failed_checkpoints += 1
            self.display.say(f"the checkpoint of step {self.step} could not be written, the run goes on: {error}")

    def _save(self) -> None:
        """Save the last finished step, unless its checkpoint is whole already."""
        if self._saved < self.step or self.step not in {0, *self.storage.checkpoints()}:
            self._begin_checkpoint()
            self._complete_checkpoint()

    def _open(self) -> None:
        self._evaluated = {}
        self._is_skipped = False
        self._num_lost_publications = 0
        self._num_failed_checkpoints = 0
        self._exit.callback(claim(self.storage, self.config).close)
        self.storage.open_for_writing(self.display.say)
        self.watch = Watch(self.storage.directory, num_ranks=self.config.learner.num_ranks)
        self._on_processes = self.watch.workers
        self._open_trackers()
        super()._open()
        self._saved = self.step
        self._counts = self.pipeline.counts()
        self._state = self.pipeline.state_dict()
        self._trackers.add(TensorBoard(self.storage.path("tensorboard", "."), last_step=self.step))
        self._trackers.add(RayGauges(self.storage.name, list(self.config.reward.components)))
        self.recorder = Recorder(self.storage, last_step=self.step, trackers=self._trackers)
        self._exit.callback(self._close_records)
        self.stop = self._exit.enter_context(StopRequest())  # Ray has put handlers of its own there before

    def _open_trackers(self) -> None:
        """Open those that a person has asked for before any process starts: they may want a login."""
        self._trackers = Trackers(say=self.display.say)
        self._exit.callback(self._trackers.close)
        for name in self.config.run.trackers:
            self._trackers.add(make_tracker(name, self.config, self.storage))

    def _say_of_learner(self, text: str) -> None:
        self.watch.learner_lost()
        super()._say_of_learner(text)

    def _begin_without_checkpoint(self) -> None:
        self.display.say("no whole checkpoint is left; the run starts again and learns the steps in rollouts/ again")

    def _journal(self) -> LedgerJournal:
        self._store = LedgerStore(self.storage.path(LEDGER_FILE), say=self.display.say)
        self._store.rewind(self.step)
        return self._store

    def _incarnations(self) -> Iterator[int]:
        return DurableIncarnations(self.storage)

    def _close_records(self) -> None:
        """Complete the records; what keeps them from it is said, since something else may have ended the run."""
        with suppress(Exception):  # whatever ended the pipeline: the counts are those of the last step then
            self._counts = self.pipeline.counts()
        quarantined = [row for source in self._sources for row in source.quarantined]
        summary = {
            "steps": self.step,
            "groups": self._counts,
            "quarantined_rows": [{"file": row.file, "line": row.line, "reason": row.reason} for row in quarantined],
            "num_quarantined_rows": sum(source.num_quarantined for source in self._sources),
        }
        try:
            self.recorder.close()
            self.storage.write_text(json.dumps(summary, indent=1), "summary.json")
        except (OSError, StorageError) as error:
            self.display.say(f"metrics.parquet or summary.json could not be brought up to date: {error}")
        for row in quarantined:
            self.display.say(f"quarantined {row.file}:{row.line}: {row.reason}")
        self.display.say(_conservation(self.step, self._counts))


def _conservation(step: int, counts: Mapping[str, int]) -> str:
    """Return e.g. `groups after step 4: 16 accepted = 15 trained + 0 dropped + 1 quarantined + 0 in flight`."""
    parts = " + ".join(f"{counts[name]} {name}" for name in ("trained", "dropped", "quarantined"))
    return f"groups after step {step}: {counts['accepted']} accepted = {parts} + {counts['in_flight']} in flight"
