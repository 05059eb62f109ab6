"""A group's order of work, and a step's batch of finished groups."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from actors.engine import SamplingParams
from actors.prompts import DrawnPrompt
from actors.rollout_worker import Lease
from actors.schema import group_id
from cluster.config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a rollout worker needs for one group, whoever it is and however often it is tried."""

    group_id: str
    epoch: int
    table: pa.Table
    """PROMPTS, one row."""
    num_samples: int
    sampling: SamplingParams
    seed: int

    def lease(self, lease_id: int, incarnation: int) -> Lease:
        """Return one attempt's order; its randomness is the group's, not the attempt's."""
        return Lease(
            lease_id=lease_id,
            epoch=self.epoch,
            group_id=self.group_id,
            incarnation=incarnation,
            num_samples=self.num_samples,
            sampling=self.sampling,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Complete groups of one step: references to SCORED tables, and the numbers the driver needs."""

    step: int
    group_ids: tuple[str, ...]
    """Sorted."""
    tables: tuple[Any, ...]
    """One SCORED table a group, or a reference to it, aligned with group_ids."""
    samples: pa.Table
    """SAMPLES rows of all groups, sorted by group and sample."""
    generate_s: float = 0.0
    """From the first lease to the last finished generation."""
    score_s: float = 0.0
    """From the last finished generation to the last score: what judging adds to the step."""
    finished_at: float | None = None
    """When the last score came, by the pipeline's clock; None for a batch that was read from the redo log."""
    after: dict[str, Any] = field(default_factory=dict)
    """Plain data for the redo log: where the prompts stand after this batch, leases, quarantined groups, and with
    dynamic sampling those that were dropped."""

    @property
    def quarantined(self) -> dict[str, str]:
        """Return the groups that failed through their own fault, with the reasons."""
        quarantined: dict[str, str] = self.after["quarantined"]
        return quarantined

    @property
    def dropped(self) -> dict[str, str]:
        """Return the groups that were judged and got no place in the batch, with the reasons."""
        dropped: dict[str, str] = self.after["dropped"] if self._is_sampled_dynamically else {}
        return dropped

    @property
    def metrics(self) -> dict[str, float]:
        """Return what the step's metrics say of the batch; nothing without dynamic sampling."""
        return {"num_uninformative": float(len(self.dropped))} if self._is_sampled_dynamically else {}

    @property
    def _is_sampled_dynamically(self) -> bool:
        return "dropped" in self.after


def training_work(config: RunConfig, prompt: DrawnPrompt) -> Work:
    """Return the order for a group of training."""
    rollouts = config.rollouts
    return Work(
        group_id=group_id(prompt.epoch, prompt.prompt_id),
        epoch=prompt.epoch,
        table=prompt.table,
        num_samples=rollouts.samples_per_prompt,
        sampling=SamplingParams(
            max_new_tokens=rollouts.max_new_tokens, temperature=rollouts.temperature, stop=rollouts.stop
        ),
        seed=config.run.seed,
    )


def held_out_work(config: RunConfig, prompt: DrawnPrompt) -> Work:
    """Return the order for a group of evaluation: the same one, random numbers included, at every version."""
    evaluation = config.evaluation
    return Work(
        group_id=f"evaluation/{prompt.prompt_id}",
        epoch=prompt.epoch,
        table=prompt.table,
        num_samples=evaluation.samples_per_prompt,
        sampling=SamplingParams(
            max_new_tokens=config.rollouts.max_new_tokens,
            temperature=evaluation.temperature,
            top_k=evaluation.top_k,
            top_p=evaluation.top_p,
            stop=config.rollouts.stop,
        ),
        seed=evaluation.seed,
    )
