"""From prompts to complete, judged groups: leases to rollout workers, references to reward workers, then batches.

A group is one prompt in one epoch with its n samples; it is judged as soon as it is generated, while others still
generate.  Results are owned by the driver, which moves references and small
metadata tables; rows are read only to be kept in the run directory.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from actors.engine import SamplingParams
from actors.prompts import DrawnPrompt, PromptSource
from actors.rollout_worker import Lease
from actors.schema import group_id
from actors.weights import Publication
from cluster.config import RunConfig
from cluster.ledger import GroupState, Ledger
from cluster.pool import WorkerError, WorkerPool, fetch

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Complete groups of one step: references to SCORED tables, and the numbers the driver needs."""

    step: int
    group_ids: tuple[str, ...]
    tables: tuple[Any, ...]
    """References to one SCORED table a group, aligned with group_ids."""
    samples: pa.Table
    """SAMPLES rows of all groups, sorted by group and sample."""
    generate_s: float
    """From the first lease to the last finished generation."""
    score_s: float
    """From the last finished generation to the last score: what judging adds to the step."""


@dataclass(slots=True, kw_only=True)
class _Call:
    """One remote call in flight for a group."""

    lease: Lease
    pool: WorkerPool
    worker: int
    table: Any
    stage: GroupState


@dataclass(slots=True, kw_only=True)
class _Round:
    """Groups that are generated and judged together."""

    calls: dict[Any, _Call] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, pa.Table] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    generated: float = 0.0


class Pipeline:
    """Owns the prompt order, the ledger and both pools."""

    def __init__(
        self, config: RunConfig, *, prompts: PromptSource, rollouts: WorkerPool, rewards: WorkerPool, ledger: Ledger
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._rollouts = rollouts
        self._rewards = rewards
        self.ledger = ledger
        self.on_progress: Progress = lambda what, done, total: None

    def take_batch(self, step: int) -> Batch:
        """Draw the step's prompts and return their groups, generated and judged."""
        rollouts = self._config.rollouts
        drawn = self._prompts.draw(rollouts.prompts_per_step)
        sampling = SamplingParams(
            max_new_tokens=rollouts.max_new_tokens, temperature=rollouts.temperature, stop=rollouts.stop
        )
        leases = []
        for prompt in drawn:
            identity = group_id(prompt.epoch, prompt.prompt_id)
            self.ledger.accept(identity)
            lease = Lease(
                lease_id=self.ledger.lease(identity),
                epoch=prompt.epoch,
                group_id=identity,
                incarnation=0,
                num_samples=rollouts.samples_per_prompt,
                sampling=sampling,
                seed=self._config.run.seed,
            )
            leases.append((lease, prompt))
        batch = self._work(step, leases, on_stage=self.ledger.move)
        for identity in batch.group_ids:
            self.ledger.move(identity, GroupState.BATCHED)
        return batch

    def mark_trained(self, batch: Batch) -> None:
        """Record that the learner has stepped on a batch."""
        for identity in batch.group_ids:
            self.ledger.move(identity, GroupState.TRAINED)

    def evaluate(self, prompts: Sequence[DrawnPrompt]) -> Batch:
        """Answer and judge held-out prompts with fixed random numbers; the training ledger does not know of them."""
        evaluation = self._config.evaluation
        sampling = SamplingParams(
            max_new_tokens=self._config.rollouts.max_new_tokens,
            temperature=evaluation.temperature,
            top_k=evaluation.top_k,
            top_p=evaluation.top_p,
            stop=self._config.rollouts.stop,
        )
        leases = [
            (
                Lease(
                    lease_id=0,
                    epoch=prompt.epoch,
                    group_id=f"evaluation/{prompt.prompt_id}",
                    incarnation=0,
                    num_samples=evaluation.samples_per_prompt,
                    sampling=sampling,
                    seed=evaluation.seed,
                ),
                prompt,
            )
            for prompt in prompts
        ]
        return self._work(0, leases, on_stage=lambda identity, stage: None)

    def take_weights(self, publication: Publication) -> None:
        """Give every rollout worker a new version."""
        calls = [worker.update_weights.remote(publication) for worker in self._rollouts.workers]
        fetch(calls, what=f"loading version {publication.version}", timeout_s=self._config.pipeline.timeout_s)

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for the checkpoint."""
        return {"prompts": self._prompts.position, "ledger": self.ledger.snapshot()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        self._prompts.seek(state["prompts"])
        self.ledger.restore(state["ledger"])

    def close(self) -> None:
        """End both pools."""
        self._rollouts.close()
        self._rewards.close()

    def _work(
        self,
        step: int,
        leases: Sequence[tuple[Lease, DrawnPrompt]],
        *,
        on_stage: Callable[[str, GroupState], None],
    ) -> Batch:
        round_ = _Round()
        for lease, prompt in leases:
            self._send(round_, lease, self._rollouts, prompt.table, GroupState.GENERATED)
        while round_.calls:
            for reference in self._wait(round_):
                call = round_.calls.pop(reference)
                call.pool.give_back(call.worker)
                what = f"{call.pool.role} of group {call.lease.group_id}"
                answer = fetch(reference, what=what, timeout_s=self._config.pipeline.timeout_s)
                on_stage(call.lease.group_id, call.stage)
                if call.stage is GroupState.GENERATED:
                    round_.generated = time.perf_counter()
                    self._send(round_, call.lease, self._rewards, call.table, GroupState.SCORED)
                else:
                    round_.tables[call.lease.group_id] = call.table
                    round_.samples[call.lease.group_id] = answer
                    self.on_progress("groups", len(round_.samples), len(leases))
        return _batch(step, round_)

    def _send(self, round_: _Round, lease: Lease, pool: WorkerPool, table: Any, stage: GroupState) -> None:
        index = pool.take()
        worker = pool.workers[index]
        if stage is GroupState.GENERATED:
            result, summary = worker.generate.options(num_returns=2).remote(table, lease)
        else:
            result, summary = worker.score.options(num_returns=2).remote(table)
        round_.calls[summary] = _Call(lease=lease, pool=pool, worker=index, table=result, stage=stage)

    def _wait(self, round_: _Round) -> list[Any]:
        timeout_s = self._config.pipeline.timeout_s
        ready, _ = ray.wait(list(round_.calls), timeout=timeout_s, fetch_local=False)
        if not ready:
            waiting = sorted(call.lease.group_id for call in round_.calls.values())
            raise WorkerError(
                f"a group must advance within {timeout_s:g} s and none of {len(waiting)} did ({waiting[0]}, ...); "
                "raise pipeline.timeout_s if generation is just slow"
            )
        return list(ready)


def _batch(step: int, round_: _Round) -> Batch:
    identities = tuple(sorted(round_.samples))
    return Batch(
        step=step,
        group_ids=identities,
        tables=tuple(round_.tables[identity] for identity in identities),
        samples=pa.concat_tables([round_.samples[identity] for identity in identities]),
        generate_s=round_.generated - round_.started,
        score_s=time.perf_counter() - round_.generated,
    )
