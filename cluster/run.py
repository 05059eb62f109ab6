"""A run: its processes, its directory and the verbs of the loop (`loop.py`).  Builds, resumes, tidies up."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import ray

from actors.policy import PromptEncoder, load_tokenizer
from actors.prompts import DrawnPrompt, PromptSource
from actors.rollout_worker import RolloutWorker
from cluster.config import ConfigError, RunConfig, to_yaml
from cluster.gang import LearnerGang
from cluster.ledger import Ledger
from cluster.metrics import Recorder
from cluster.pipeline import Batch, Pipeline
from cluster.placement import Placement, join_cluster, plan_placement
from cluster.pool import WorkerPool
from cluster.progress import Display
from cluster.start import cache_directory, prepare_policy
from cluster.storage import RunStorage
from cluster.transport import ObjectStoreTransport
from reward.reward_worker import RewardWorker

_STATE = "run.json"


class Run:
    """Everything a run owns.  Use as a context manager: leaving it ends every process and closes the directory."""

    pipeline: Pipeline
    learner: LearnerGang
    recorder: Recorder
    step: int
    """The last step that is done."""
    _model_dir: str
    _held_out: list[DrawnPrompt]
    _sources: list[PromptSource]

    def __init__(self, config: RunConfig, *, display: Display | None = None) -> None:
        self.config = config
        self.display = display or Display()
        self.storage = RunStorage(config.run.dir)
        self._claim_directory()
        self.step = 0
        self._evaluated: dict[str, float] = {}
        self._publish_s = 0.0
        self._step_started = 0.0
        self._exit = ExitStack()
        self._exit.callback(self.display.stop)
        try:
            self._build()
        except BaseException:
            self._exit.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and write what is buffered; what is committed stays readable."""
        self._exit.close()

    def steps(self) -> Iterator[int]:
        """Yield the steps that are left, the first one after the last checkpoint."""
        with self.display.training(self.step, self.config.run.num_steps):
            while self.step < self.config.run.num_steps:
                self._step_started = time.perf_counter()
                yield self.step + 1

    def take_batch(self, step: int) -> Batch:
        """Return the step's judged groups, already on disk: what the learner sees can always be read again."""
        batch = self.pipeline.take_batch(step)
        self.storage.write_table(_concatenate(batch), "rollouts", f"step-{step}.parquet")
        return batch

    def publish(self, version: int) -> None:
        """Give the learner's weights to every rollout worker as `version`."""
        started = time.perf_counter()
        self.pipeline.take_weights(self.learner.publish(version))
        self._publish_s = time.perf_counter() - started

    def evaluate_start(self) -> None:
        """Evaluate the policy before training; a resumed run has done so."""
        if self.step == 0 and not self.recorder.rows and self._held_out:
            row = self.evaluate(0)
            self.recorder.record(0, {"policy_version": 0, **row})
            self.display.step({"step": 0, **row}, self.config.run.num_steps)

    def evaluate_if_due(self, step: int) -> None:
        """Evaluate every `evaluation.every` steps and after the last one."""
        due = step % self.config.evaluation.every == 0 or step == self.config.run.num_steps
        self._evaluated = self.evaluate(step) if due and self._held_out else {}

    def evaluate(self, version: int) -> dict[str, float]:
        """Answer and judge the held-out prompts with the current policy; return metrics named `eval_...`."""
        with self.display.phase(f"evaluating version {version} on {len(self._held_out)} held-out prompts"):
            batch = self.pipeline.evaluate(self._held_out)
        self.storage.write_table(_concatenate(batch), "evaluation", f"step-{version}.parquet")
        metrics = self.learner.controller.evaluation_metrics(batch.samples)
        return {f"eval_{name}": value for name, value in metrics.items()}

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
            "publish_s": self._publish_s,
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
            with open(os.path.join(directory, _STATE), "w", encoding="utf-8") as file:
                json.dump(state, file)
        self.storage.keep_checkpoints(self.config.run.keep_checkpoints)
        self.recorder.compact()

    def finish(self) -> None:
        """Export the policy after the last step."""
        self.learner.export(self.storage.path("policy"))

    def _claim_directory(self) -> None:
        resolved = to_yaml(self.config)
        if self.storage.exists("config.yaml"):
            if self.storage.read_text("config.yaml") != resolved:
                raise ConfigError(
                    f"run.dir {self.storage.directory} holds a run with another configuration; "
                    "choose another run.dir, or run it with the configuration in its config.yaml to continue it"
                )
            return
        self.storage.write_text(resolved, "config.yaml")

    def _build(self) -> None:
        config = self.config
        if not ray.is_initialized():
            self._exit.callback(ray.shutdown)
        with self.display.phase("joining Ray"):
            placement = plan_placement(config, cores=join_cluster(config))
        with self.display.phase("preparing the policy"):
            self._model_dir = self._starting_model(placement)
        prompts, held_out = self._prompt_sources()
        self._held_out = held_out.first(config.evaluation.num_prompts) if held_out else []
        self._sources = [source for source in (prompts, held_out) if source]
        with self.display.phase("starting workers"):
            self._start_processes(placement, prompts)
        self.recorder = Recorder(self.storage)
        self._exit.callback(self._close_records)
        self._resume()
        self.publish(self.step)

    def _starting_model(self, placement: Placement) -> str:
        last = self._last_checkpoint()
        if last is None:
            return prepare_policy(self.config, learner=placement.learner)
        with open(os.path.join(last, _STATE), encoding="utf-8") as file:
            directory: str = json.load(file)["model_dir"]
        return directory

    def _prompt_sources(self) -> tuple[PromptSource, PromptSource | None]:
        config = self.config
        encoder = PromptEncoder(load_tokenizer(self._model_dir, trust_remote_code=config.policy.trust_remote_code))
        cache = cache_directory()
        prompts = PromptSource(config.prompts, encoder, seed=config.run.seed, cache_dir=cache)
        held_out = config.evaluation.prompts
        return prompts, PromptSource(held_out, encoder, seed=config.run.seed, cache_dir=cache) if held_out else None

    def _start_processes(self, placement: Placement, prompts: PromptSource) -> None:
        config, transport = self.config, ObjectStoreTransport()
        rollouts = WorkerPool(
            RolloutWorker,
            {
                "model_dir": self._model_dir,
                "policy": config.policy,
                "rollouts": config.rollouts,
                "transport": transport,
                "run_id": os.path.basename(self.storage.directory),
                "seed": config.run.seed,
                "device": placement.rollout.device,
                "num_threads": placement.rollout.threads,
            },
            placement.rollout,
        )
        rewards = WorkerPool(
            RewardWorker,
            {
                "reward": config.reward,
                "policy": config.policy,
                "reference_dir": self._model_dir,
                "temperature": config.rollouts.temperature,
                "device": placement.reward.device,
                "num_threads": placement.reward.threads,
            },
            placement.reward,
        )
        self.pipeline = Pipeline(config, prompts=prompts, rollouts=rollouts, rewards=rewards, ledger=Ledger())
        self.pipeline.on_progress = self.display.groups
        self._exit.callback(self.pipeline.close)
        self.learner = LearnerGang(config, model_dir=self._model_dir, processes=placement.learner, transport=transport)
        self._exit.callback(self.learner.close)
        rollouts.wait_ready(config.placement.ready_timeout_s)
        rewards.wait_ready(config.placement.ready_timeout_s)
        self.learner.wait_ready()

    def _last_checkpoint(self) -> str | None:
        steps = self.storage.checkpoints()
        return self.storage.read_checkpoint(steps[-1]) if steps else None

    def _resume(self) -> None:
        directory = self._last_checkpoint()
        if directory is not None:
            with open(os.path.join(directory, _STATE), encoding="utf-8") as file:
                state = json.load(file)
            self.step = state["step"]
            self.learner.load(directory)
            self.pipeline.load_state_dict(state["pipeline"])
            self.display.say(f"continuing after step {self.step}")
        self.recorder.resume(self.step)

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


def _concatenate(batch: Batch) -> Any:
    import pyarrow as pa

    return pa.concat_tables(ray.get(list(batch.tables)))
