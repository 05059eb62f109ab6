"""A training run: a session with a directory of its own, and the verbs of the loop (`loop.py`)."""

import json
import os
import time
from collections.abc import Iterator, Mapping

from cluster.claim import claim
from cluster.metrics import Recorder
from cluster.pipeline import Batch
from cluster.session import STATE_FILE, Session


class Run(Session):
    """A session that trains and keeps records.  Leaving it ends every process and closes the directory."""

    recorder: Recorder
    _evaluated: dict[str, float]
    _step_started: float

    def __enter__(self) -> "Run":
        return self

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, the first one after the last checkpoint."""
        with self.display.training(self.step, self.config.run.num_steps):
            while self.step < self.config.run.num_steps:
                self._step_started = time.perf_counter()
                yield self.step + 1

    def take_batch(self, step: int) -> Batch:
        """Return the step's judged groups, already on disk: what the learner sees can always be read again."""
        batch = self.pipeline.take_batch(step)
        self.storage.write_table(self.tables(batch), "rollouts", f"step-{step}.parquet")
        return batch

    def evaluate_start(self) -> None:
        """Evaluate the policy before training; a resumed run has done so."""
        if self.step == 0 and not self.recorder.rows and self.held_out:
            row = self.evaluate(0)
            self.recorder.record(0, {"policy_version": 0, **row})
            self.display.step({"step": 0, **row}, self.config.run.num_steps)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate every `evaluation.every` steps and after the last one."""
        due = step % self.config.evaluation.every == 0 or step == self.config.run.num_steps
        self._evaluated = self.evaluate(step) if due and self.held_out else {}

    def evaluate(self, version: int) -> dict[str, float]:
        """Evaluate the current policy and keep its answers in the run directory."""
        batch, metrics = self.answer_held_out(version)
        self.storage.write_table(self.tables(batch), "evaluation", f"step-{version}.parquet")
        return metrics

    def record(self, step: int, batch: Batch, result: Mapping[str, float]) -> dict[str, float]:
        """Account for a step: ledger, metrics row, progress."""
        self.pipeline.mark_trained(batch)
        counts = self.pipeline.ledger.counts()
        metrics = {
            "policy_version": step,
            **result,
            **self._evaluated,
            "generate_s": batch.generate_s,
            "score_s": batch.score_s,
            "publish_s": self.publish_s,
            "step_s": time.perf_counter() - self._step_started,
            **{f"groups_{name}": count for name, count in counts.items()},
        }
        metrics["tokens_per_s"] = metrics["num_tokens"] / metrics["step_s"]
        self.recorder.record(step, metrics)
        self.display.step({"step": step, **metrics}, self.config.run.num_steps)
        self.step = step
        return metrics

    def checkpoint_if_due(self, step: int) -> None:
        """Save resumable state every `run.checkpoint_every` steps and after the last one."""
        if step % self.config.run.checkpoint_every and step != self.config.run.num_steps:
            return
        with self.storage.writing_checkpoint(step) as directory:
            self.learner.save(directory)
            state = {"step": step, "model_dir": self._model_dir, "pipeline": self.pipeline.state_dict()}
            with open(os.path.join(directory, STATE_FILE), "w", encoding="utf-8") as file:
                json.dump(state, file)
        self.storage.keep_checkpoints(self.config.run.keep_checkpoints)
        self.recorder.compact()

    def finish(self) -> None:
        """Export the policy after the last step."""
        self.learner.export(self.storage.path("policy"))

    def _open(self) -> None:
        self._evaluated = {}
        self._exit.callback(claim(self.storage, self.config).close)
        super()._open()
        self.recorder = Recorder(self.storage, last_step=self.step)
        self._exit.callback(self._close_records)

    def _close_records(self) -> None:
        self.recorder.close()
        quarantined = [row for source in self._sources for row in source.quarantined]
        summary = {
            "steps": self.step,
            "groups": self.pipeline.ledger.counts(),
            "quarantined_rows": [{"file": row.file, "line": row.line, "reason": row.reason} for row in quarantined],
            "num_quarantined_rows": sum(source.num_quarantined for source in self._sources),
        }
        self.storage.write_text(json.dumps(summary, indent=1), "summary.json")
        for row in quarantined:
            self.display.say(f"quarantined {row.file}:{row.line}: {row.reason}")
