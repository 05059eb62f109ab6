"""The processes of a run at its newest checkpoint: what training and evaluation alone have in common."""

import json
import os
import sys
import time
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import ray

from actors.cache import cache_directory
from actors.config import PromptsConfig
from actors.policy import PromptEncoder, load_tokenizer, max_positions
from actors.prompts import DrawnPrompt, PromptSource
from actors.rollout_worker import RolloutWorker
from cluster.config import ConfigError, RunConfig
from cluster.gang import LearnerGang
from cluster.ledger import Ledger
from cluster.pipeline import Batch, Pipeline
from cluster.placement import Placement, join_cluster, plan_placement
from cluster.pool import WorkerPool, fetch
from cluster.progress import Display
from cluster.start import prepare_policy
from cluster.storage import RunStorage
from cluster.transport import ObjectStoreTransport
from reward.config import ComponentConfig, RewardConfig
from reward.reward_worker import RewardWorker

STATE_FILE = "run.json"


class Session:
    """Workers, learner and prompts, continued from the run directory's newest checkpoint; writes nothing there.

    Use as a context manager: leaving it ends every process.
    """

    pipeline: Pipeline
    learner: LearnerGang
    held_out: list[DrawnPrompt]
    _model_dir: str
    _sources: list[PromptSource]

    def __init__(self, config: RunConfig, *, display: Display | None = None) -> None:
        self.config = config
        self.display = display or Display()
        self.storage = RunStorage(config.run.dir)
        self.step = 0
        """The last step that is done."""
        self.publish_s = 0.0
        self._exit = ExitStack()
        self._exit.callback(self.display.stop)
        try:
            self._open()
        except BaseException:
            self._exit.close()
            raise

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process."""
        self._exit.close()

    def publish(self, version: int) -> None:
        """Give the learner's weights to every rollout worker as `version`."""
        started = time.perf_counter()
        self.pipeline.take_weights(self.learner.publish(version))
        self.publish_s = time.perf_counter() - started

    def answer_held_out(self, version: int) -> tuple[Batch, dict[str, float]]:
        """Answer and judge the held-out prompts with the current policy; return them with metrics named `eval_...`."""
        with self.display.phase(f"evaluating version {version} on {len(self.held_out)} held-out prompts"):
            batch = self.pipeline.evaluate(self.held_out)
        metrics = self.learner.controller.evaluation_metrics(batch.samples)
        return batch, {f"eval_{name}": value for name, value in metrics.items()}

    def tables(self, batch: Batch) -> pa.Table:
        """Return a batch's SCORED rows, for the run directory."""
        references = list(batch.tables)
        return pa.concat_tables(fetch(references, what="reading a batch", timeout_s=self.config.pipeline.timeout_s))

    def _open(self) -> None:
        """Start everything; `Run` claims its directory before and opens its records after."""
        config = self.config
        if not ray.is_initialized():
            self._exit.callback(ray.shutdown)
        with self.display.phase("joining Ray"):
            cores, node_cores = join_cluster(config)
            placement = plan_placement(config, cores=cores, node_cores=node_cores)
        with self.display.phase("preparing the policy"):
            self._model_dir = self._starting_model(placement)
        prompts = self._read_prompts()
        with self.display.phase("starting workers"):
            self._start_processes(placement, prompts)
        directory = self._last_checkpoint()
        if directory is not None:
            self._restore(directory)
        self.publish(self.step)

    def _starting_model(self, placement: Placement) -> str:
        last = self._last_checkpoint()
        if last is not None:
            directory: str = _read_state(last)["model_dir"]
            if os.path.isdir(directory):
                return directory
        return prepare_policy(self.config, learner=placement.learner)

    def _fitting(self, prompts: PromptsConfig, where: str) -> PromptsConfig:
        """Return the section with a limit under which every prompt and its response fit the policy's positions."""
        config = self.config
        positions = max_positions(self._model_dir, trust_remote_code=config.policy.trust_remote_code) or sys.maxsize
        room = positions - config.rollouts.max_new_tokens
        if room < 1 or (prompts.max_prompt_tokens or 1) > room:
            raise ConfigError(
                f"{where}.max_prompt_tokens + rollouts.max_new_tokens must be at most {positions}, the policy's "
                f"positions, got {prompts.max_prompt_tokens or 1} + {config.rollouts.max_new_tokens}; lower one of them"
            )
        return prompts.model_copy(update={"max_prompt_tokens": prompts.max_prompt_tokens or room})

    def _read_prompts(self) -> PromptSource:
        config, cache = self.config, cache_directory()
        encoder = PromptEncoder(load_tokenizer(self._model_dir, trust_remote_code=config.policy.trust_remote_code))
        prompts = PromptSource(self._fitting(config.prompts, "prompts"), encoder, seed=config.run.seed, cache_dir=cache)
        self._sources, self.held_out = [prompts], []
        if config.evaluation.prompts is not None:
            section = self._fitting(config.evaluation.prompts, "evaluation.prompts")
            held_out = PromptSource(section, encoder, seed=config.run.seed, cache_dir=cache)
            self._sources.append(held_out)
            self.held_out = held_out.first(config.evaluation.num_prompts)
            if len(self.held_out) < config.evaluation.num_prompts:
                self.display.say(
                    f"evaluation.prompts has {len(self.held_out)} good rows; evaluation.num_prompts asks for "
                    f"{config.evaluation.num_prompts}"
                )
        return prompts

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
                "reward": _with_absolute_paths(config.reward),
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

    def _restore(self, directory: str) -> None:
        state = _read_state(directory)
        self.step = state["step"]
        self.learner.load(directory)
        self.pipeline.load_state_dict(state["pipeline"])
        self.display.say(f"continuing after step {self.step}")


def _read_state(directory: str) -> dict[str, Any]:
    with open(os.path.join(directory, STATE_FILE), encoding="utf-8") as file:
        state: dict[str, Any] = json.load(file)
    return state


def _with_absolute_paths(reward: RewardConfig) -> RewardConfig:
    """Return the section with local model directories made absolute: workers may start in another directory."""
    components = {name: _absolute(component) for name, component in reward.components.items()}
    return reward.model_copy(update={"components": components})


def _absolute(component: ComponentConfig) -> ComponentConfig:
    def resolved(path: str) -> str:
        return os.path.abspath(path) if os.path.isdir(path) else path

    model = component.model and resolved(component.model)
    return component.model_copy(update={"model": model, "ensemble": tuple(map(resolved, component.ensemble))})
