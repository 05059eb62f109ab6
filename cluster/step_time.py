"""How long a step will take, from what an earlier run on the same kind of hardware has measured.

Each phase of a step is scaled by its work and by who shares it:

    generate, score    parameters x sequences x response tokens / workers
    learn              parameters x sequences x response tokens x epochs / ranks
    publish            parameters

What a step takes beside them (metrics, redo log) is taken as it was.  So a run like the earlier one gets its own
figure; a far larger model, longer responses, whose attention grows faster than their length, or other hardware do not
follow.
"""

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import ConfigError, RunConfig, load
from cluster.memory_plan import Sizes

PHASES = ("generate", "score", "learn", "publish")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a run's step consists of."""

    parameters: int
    sequences: int
    response_tokens: float
    """Of one response."""
    epochs: int
    rollout_workers: int
    reward_workers: int
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a step."""

    phases: Mapping[str, float]
    other_s: float
    step_s: float
    source: str
    """The run directory that was measured, and over how many steps."""
    growth: float
    """Parameters relative to the run that was measured."""


def estimate(config: RunConfig, sizes: Sizes, measured: Sizes | None, run_dir: str) -> StepTime | None:
    """Return the time of a step, None where the earlier run has not finished one.

    Args:
        config: the run that is planned.
        sizes: of its models.
        measured: of the earlier run's models; None = the same.
        run_dir: the earlier run.

    Raises:
        ConfigError: when it is no run directory.
    """
    earlier = earlier_config(run_dir)
    rows = _rows(run_dir)
    if not rows:
        return None
    # The first step warms up: memory is taken, kernels are chosen.
    rows = rows[1:] or rows
    medians = {name: statistics.median(row[f"{name}_s"] for row in rows) for name in PHASES}
    step_s = statistics.median(row["step_s"] for row in rows)
    length = statistics.median(row["response_length_mean"] for row in rows)
    before = work_of(earlier, measured or sizes, response_tokens=length)
    # How long responses become is the policy's affair; they grow as their limit does.
    now_length = length * config.rollouts.max_new_tokens / earlier.rollouts.max_new_tokens
    now = work_of(config, sizes, response_tokens=now_length)
    return combine(
        scaled(medians, before, now),
        other_s=max(0.0, step_s - _together(medians, earlier.pipeline.max_staleness)),
        max_staleness=config.pipeline.max_staleness,
        source=f"{run_dir}, median of {len(rows)} steps",
        growth=now.parameters / before.parameters,
    )


def has_measured(run_dir: str) -> bool:
    """Return whether a directory is that of a run with finished steps."""
    return os.path.isfile(os.path.join(run_dir, "config.yaml")) and bool(_rows(run_dir))


def earlier_config(run_dir: str) -> RunConfig:
    """Return the configuration of a run directory.

    Raises:
        ConfigError: when it is none.
    """
    path = os.path.join(run_dir, "config.yaml")
    if not os.path.isfile(path):
        raise ConfigError(f"--calibration must be the directory of a run, and {run_dir!r} holds no config.yaml")
    return load(RunConfig, path)


def work_of(config: RunConfig, sizes: Sizes, *, response_tokens: float) -> Work:
    """Return what a run's step consists of."""
    return Work(
        parameters=sizes.policy_parameters,
        sequences=config.rollouts.prompts_per_step * config.rollouts.samples_per_prompt,
        response_tokens=response_tokens,
        epochs=config.learner.epochs,
        rollout_workers=config.rollouts.num_workers * config.rollouts.tensor_parallel,
        reward_workers=config.reward.num_workers,
        ranks=config.learner.num_ranks,
    )


def scaled(phases: Mapping[str, float], before: Work, now: Work) -> dict[str, float]:
    """Return the seconds of each phase with other work; see the module."""
    size = now.parameters / before.parameters
    tokens = now.sequences * now.response_tokens / (before.sequences * before.response_tokens)
    factors = {
        "generate": size * tokens * before.rollout_workers / now.rollout_workers,
        "score": size * tokens * before.reward_workers / now.reward_workers,
        "learn": size * tokens * now.epochs / before.epochs * before.ranks / now.ranks,
        "publish": size,
    }
    return {name: phases[name] * factor for name, factor in factors.items()}


def combine(phases: Mapping[str, float], *, other_s: float, max_staleness: int, source: str, growth: float) -> StepTime:
    """Return a step of these phases, which take turns on-policy and else run beside each other."""
    step_s = _together(phases, max_staleness) + other_s
    return StepTime(phases=dict(phases), other_s=other_s, step_s=step_s, source=source, growth=growth)


def _together(phases: Mapping[str, float], max_staleness: int) -> float:
    if max_staleness == 0:
        return sum(phases.values())
    return max(phases["generate"] + phases["score"], phases["learn"] + phases["publish"])


def _rows(run_dir: str) -> list[dict[str, float]]:
    """Return the metrics of the steps that were made; a last line that a crash tore is left out."""
    path = os.path.join(run_dir, "metrics.jsonl")
    if not os.path.isfile(path):
        return []
    needed = {"step_s", "response_length_mean", *(f"{name}_s" for name in PHASES)}
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] >= 1 and needed <= row.keys():
                rows.append(row)
    return rows
