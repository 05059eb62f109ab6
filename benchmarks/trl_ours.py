"""Concord's side of `benchmarks.trl`: a real run on Ray, one step at a time, with forced response lengths."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

import cluster.session
from actors.engine import Request
from actors.rollout_worker import Lease, RolloutWorker
from benchmarks.trl_workload import Algorithm, Settings, Workload
from cluster.config import RunConfig, read_yaml, to_yaml, validate
from cluster.loop import train_step
from cluster.run import Run

_IDLE_AFTER_S, _LOOK_S, _BUSY_SHARE, _LONGEST_S = 0.5, 0.1, 0.5, 10.0
"""A run is idle when for so long no look, each so long, finds more than that share of a core in use; it is not waited
for longer than that."""


class ForcedLengthsWorker(RolloutWorker):
    """A rollout worker whose responses have the lengths that the prompt's `extras` name."""

    def _request(self, prompt: pa.Table, lease: Lease) -> Request:
        lengths = json.loads(prompt["extras"][0].as_py())["forced_lengths"]
        return replace(super()._request(prompt, lease), forced_lengths=tuple(lengths))


def make_config(
    directory: str,
    workload: Workload,
    *,
    model: str,
    judge: str,
    algorithm: Algorithm,
    critic: str,
    num_steps: int,
    settings: Settings,
    overrides: Sequence[str],
) -> RunConfig:
    """Return the run's configuration; its prompts are written beside it.

    Args:
        directory: an empty one, for all the run writes.
        workload: what is generated.
        model: of the policy.
        judge: of the reward model; PPO has it, GRPO the scripted reward.
        algorithm: which one.
        critic: PPO's, trunk or separate.
        num_steps: steps that can be taken.
        settings: of the update.
        overrides: `section.field=value`, the last word.
    """
    prompts = os.path.join(directory, "prompts.jsonl")
    with open(prompts, "w", encoding="utf-8") as file:
        for text, lengths in zip(workload.prompts, workload.lengths, strict=True):
            file.write(json.dumps({"prompt": text, "forced_lengths": lengths}) + "\n")
    common = {"name": algorithm, "kl": {"coef": settings.kl_coef}, "clip_range": settings.clip_range}
    of_ppo = {
        "value_clip_range": settings.value_clip_range,
        "value_coef": settings.value_coef,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
    }
    is_ppo = algorithm == "ppo"
    sections = {
        # one more step than is taken: the last one of a run is followed by a checkpoint
        "run": {"dir": os.path.join(directory, "run"), "num_steps": num_steps + 1, "checkpoint_every": num_steps + 1},
        "policy": {"model": model, "dtype": "float32"},
        "prompts": {"path": prompts, "shuffle": False},
        "rollouts": {
            "prompts_per_step": len(workload.prompts),
            "samples_per_prompt": workload.num_samples,
            "max_new_tokens": workload.max_new_tokens,
            "max_rows": 32,
            "temperature": settings.temperature,
        },
        "reward": {
            "components": {
                "judge": {"model": judge} if is_ppo else {"function": "benchmarks.trl_workload:scripted_reward"}
            }
        },
        "learner": {
            "epochs": 1,
            "num_minibatches": 1,
            "critic": critic,
            "optimizer": {
                "learning_rate": settings.learning_rate,
                "betas": list(settings.betas),
                "eps": settings.eps,
                "weight_decay": settings.weight_decay,
                "max_grad_norm": settings.max_grad_norm,
            },
        },
        "algorithm": common | (of_ppo if is_ppo else {}),
    }
    path = os.path.join(directory, "config.yaml")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(sections, file)  # JSON is YAML
    return validate(RunConfig, read_yaml(path, list(overrides)), where="benchmarks.trl")


class Concord:
    """A run that takes one step when asked.  Use as a context manager.

    Args:
        config: see `make_config`.
        strangers: process ids below this one that are not Concord's.
    """

    def __init__(self, config: RunConfig, *, strangers: Sequence[int]) -> None:
        cluster.session.RolloutWorker = ForcedLengthsWorker  # type: ignore[misc]
        self._strangers = frozenset(strangers)
        self._run = Run(config)
        self._steps = self._run.steps()
        self.ready = to_yaml(self._run.config)

    def __enter__(self) -> "Concord":
        return self

    def __exit__(self, *exception: object) -> None:
        self._steps.close()  # type: ignore[attr-defined]
        self._run.__exit__(*exception)

    def step(self) -> dict[str, Any]:
        """Take a step; return seconds, seconds by phase, the prompts' ids and the responses' lengths, row by row.

        The step lasts until its processes are idle: workers take new weights after the loop's step has ended.
        """
        started = time.perf_counter()
        step = next(self._steps)
        metrics = train_step(self._run, step)
        seconds = self._idle_since() - started
        phases = {name: metrics[f"{name}_s"] for name in ("generate", "score")} | {"train": metrics["learn_s"]}
        rows = pq.read_table(self._run.storage.path("rollouts", f"step-{step}.parquet"))
        return {
            "seconds": seconds,
            "phases": {**phases, "publish": metrics["publish_s"]}
            | {"other": seconds - sum(phases.values()) - metrics["publish_s"]},
            "prompt_ids": rows["prompt_ids"].to_pylist(),
            "lengths": [len(ids) for ids in rows["response_ids"].to_pylist()],
            "loss_tokens": sum(sum(mask) for mask in rows["loss_mask"].to_pylist()),
            "metrics": {name: value for name, value in metrics.items() if isinstance(value, int | float)},
        }

    def processes(self) -> list[psutil.Process]:
        """Return the driver and all processes that it started, Ray's own included."""
        driver = psutil.Process()
        children = driver.children(recursive=True)
        return [driver, *(child for child in children if child.pid not in self._strangers)]

    def _idle_since(self) -> float:
        """Wait until nothing works any more; return the time at which the last one stopped."""
        processes = self.processes()
        started = last_busy = now = time.perf_counter()
        used = cpu_s(processes)
        while now - last_busy < _IDLE_AFTER_S and now - started < _LONGEST_S:
            time.sleep(_LOOK_S)
            before, used = used, cpu_s(processes)
            now = time.perf_counter()
            if used - before > _BUSY_SHARE * _LOOK_S:
                last_busy = now
        return last_busy


def cpu_s(processes: Sequence[psutil.Process]) -> float:
    """Return the CPU seconds that processes have used; one that has ended counts nothing."""
    return _total(processes, lambda process: sum(process.cpu_times()[:2]))


def resident_bytes(processes: Sequence[psutil.Process]) -> int:
    """Return the memory that processes hold for themselves."""
    return int(_total(processes, lambda process: process.memory_full_info().uss))


def _total(processes: Sequence[psutil.Process], read: Callable[[psutil.Process], float]) -> float:
    total = 0.0
    for process in processes:
        try:
            total += read(process)
        except psutil.NoSuchProcess:
            continue
    return total
