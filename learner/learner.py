"""One rank of the learner: the epoch loop of PPO over a step's batch.

What each rank computes is fixed by the plan; every denominator is the minibatch's global one, so parameters do not
depend on how many ranks or micro-batches there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from actors.config import PolicyConfig
from actors.faults import fault
from actors.policy import load_model, resolve_dtype
from actors.rows import GroupRow, PromptGroup, split_responses
from actors.weights import Publication, WeightTransport
from learner import state
from learner.batch import Microbatch, StepPlan, Update
from learner.config import AlgorithmConfig, LearnerConfig
from learner.experience import FirstPass, Sample, SampleTargets, judge, prompt_groups, read_samples, sample_indices
from learner.losses import SHARE_NAMES, PPOLoss, Predictions, Targets, aggregation_weights
from learner.model import Scoring
from learner.networks import Networks
from learner.optimizer import NonFiniteError
from learner.publisher import Publisher, export_policy

_EMPTY = (PromptGroup(prompt_ids=[0], responses=[[0]]),)
"""What an empty micro-batch computes, with weight 0: sharded parameters are gathered by all ranks together."""

MAX_LOGPROB_GAP = 1e-3
"""Largest difference between recorded and recomputed float32 log-probs; rounding stays two orders below."""


class MismatchError(RuntimeError):
    """The engine's log-probs are not the learner's for the same weights and tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A step that ended early, on all ranks together: a loss or gradient was not finite."""

    reason: str
    has_changed: bool
    """Whether an earlier update of the step, or the separate critic's, was applied: the ranks are between two steps."""


class LearnerRank:
    """One process of the learner gang; every method is called on all ranks together, with the same arguments."""

    def __init__(
        self,
        *,
        model_dir: str,
        policy: PolicyConfig,
        learner: LearnerConfig,
        algorithm: AlgorithmConfig,
        temperature: float,
        seed: int,
        rank: int,
        world_size: int,
        device: str,
        num_threads: int,
        transport: WeightTransport,
    ) -> None:
        assert world_size == learner.num_ranks, f"the gang has {world_size} ranks, its config {learner.num_ranks}"
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        torch.manual_seed(seed)  # new weights (adapters) are the same on all ranks
        self._model_dir = model_dir
        self._algorithm = algorithm
        self._rank = rank
        self._device = torch.device(device)
        dtype = resolve_dtype(policy.dtype, self._device)
        self._records_are_old = dtype == torch.float32
        model = load_model(model_dir, dtype=dtype, device=self._device, trust_remote_code=policy.trust_remote_code)
        scoring = Scoring(
            temperature=temperature,
            chunk_tokens=learner.chunk_tokens,
            entropy_gradient=algorithm.entropy_coef > 0,
        )
        self._networks = Networks(model, learner, scoring=scoring, dtype=dtype, rank=rank)
        self._version: int | None = None  # published last; None = the weights that were loaded
        self._publisher = Publisher(self._networks.module.policy, self._networks.policy, transport)
        self._saver = state.Saver()

    def step(self, tables: Sequence[pa.Table], plan: StepPlan) -> dict[str, float] | Skipped:
        """Learn from one batch.

        Args:
            tables: SCORED, all groups of the batch, in any order.
            plan: the step's plan; its deal has this gang's number of ranks.

        Returns:
            Metrics, the same on all ranks; losses and fractions are means over the step's updates.  `Skipped`, on all
            ranks, where an update was not finite: it and the later ones were not made, earlier ones of the step stay.

        Raises:
            MismatchError: when the samples' recorded log-probs are not those of this policy.
        """
        samples = read_samples(tables, plan)
        first_pass = self._first_pass(samples, plan)
        targets, metrics = judge(samples, first_pass, plan, self._algorithm)
        batch = _Batch(plan=plan, samples=samples, targets=targets)
        num_updates = self._num_updates()
        fault("learner.before_backward", self._rank)
        try:
            meters = [self._update(update, batch, is_first=index == 0) for index, update in enumerate(plan.updates)]
        except NonFiniteError as error:
            return Skipped(reason=str(error), has_changed=self._num_updates() != num_updates)
        fault("learner.after_update", self._rank)
        self._check_gap(meters[0].gap, plan)
        return metrics | _summarise(meters, plan)

    def publish(self, version: int, incarnation: int) -> Publication | None:
        """Make the policy's weights available as `version`; rank 0 returns the announcement, other ranks None."""
        fault("learner.publish", self._rank)
        self._version = version
        return self._publisher.publish(version, incarnation)

    def begin_save(self, directory: str) -> None:
        """Copy this rank's share of the state, and begin to write it into a directory; steps may be made meanwhile.

        Raises:
            StateError: when the save before is not finished.
        """
        self._saver.begin(directory, self._networks.engines)

    def finish_save(self) -> list[str]:
        """Wait until this rank's share is written; return the names of its files.

        Raises:
            StateError: when no save was begun.
            OSError: what writing met; the learner is as good as before.
        """
        return self._saver.finish()

    def load_state(self, directory: str) -> None:
        """Continue from a saved state, of any number of ranks and any ZeRO stage."""
        state.load_state(directory, self._networks.engines)

    def export_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory, with its tokenizer; rank 0 writes."""
        export_policy(self._publisher, directory, model_dir=self._model_dir)

    def ping(self) -> int:
        """Return the number of optimizer updates so far."""
        return self._networks.policy.num_updates

    def close(self) -> None:
        """Free the engines."""
        self._networks.close()

    def _num_updates(self) -> int:
        """Return the number of updates of all engines."""
        return sum(engine.num_updates for engine in self._networks.engines.values())

    @torch.no_grad()
    def _first_pass(self, samples: Sequence[Sample], plan: StepPlan) -> list[FirstPass]:
        """Compute all values (and old log-probs where the recorded ones are not them), sharing the work over ranks."""
        mine: dict[int, FirstPass] = {}
        for microbatch in plan.value_ranks[self._rank]:
            row = self._row(microbatch, samples, plan)
            forward = self._networks.forward(row, has_tokens=not self._records_are_old)
            values = split_responses(forward.values.cpu(), [length + 1 for length in row.lengths])
            logprobs: Sequence[torch.Tensor | None] = [None] * len(values)
            if not self._records_are_old:
                logprobs = split_responses(forward.logprobs.cpu(), row.lengths)
            # an empty micro-batch has no samples: what its dummy row says is dropped here
            for index, value, old in zip(sample_indices(microbatch, plan), values, logprobs, strict=False):
                mine[index] = FirstPass(values=value, logprobs=old)
        merged: dict[int, FirstPass] = {}
        for part in self._networks.policy.all_gather(mine):
            merged |= part
        return [merged[index] for index in range(len(samples))]

    def _update(self, update: Update, batch: "_Batch", *, is_first: bool) -> "_Meter":
        """Run one minibatch's micro-batches and the optimizer update."""
        sums = torch.zeros(len(SHARE_NAMES), dtype=torch.float64)
        maxima = torch.zeros(2, dtype=torch.float64)  # ratio, gap to the recorded log-probs
        for microbatch in update.ranks[self._rank]:
            loss, gap = self._microbatch(microbatch, update, batch)
            sums += loss.shares.cpu()
            maxima = torch.maximum(maxima, torch.stack([loss.ratio_max.detach().cpu(), gap]).double())
        gradient_norm = self._networks.step(update.learning_rate)
        engine = self._networks.policy
        maxima = engine.all_reduce(maxima, "max")
        return _Meter(
            shares=engine.all_reduce(sums),
            ratio_max=float(maxima[0]),
            gap=float(maxima[1]) if is_first else 0.0,
            gradient_norm=gradient_norm,
        )

    def _microbatch(self, microbatch: Microbatch, update: Update, batch: "_Batch") -> tuple[PPOLoss, torch.Tensor]:
        """Run one forward and backward; return its loss and how far its log-probs are from the recorded ones."""
        row = self._row(microbatch, batch.samples, batch.plan)
        forward = self._networks.forward(row)
        predictions = Predictions(
            logprobs=forward.logprobs, entropy=forward.entropy, values=forward.values[row.token_states]
        )
        indices = sample_indices(microbatch, batch.plan)
        targets = batch.select(indices, self._device) if indices else _no_targets(row.targets.shape, self._device)
        weights = aggregation_weights(
            row.lengths,
            targets.loss_mask,
            self._algorithm.aggregation,
            total_tokens=update.num_tokens,
            total_sequences=update.num_sequences,
        )
        loss = self._networks.backward(
            predictions, targets, weights, algorithm=self._algorithm, total_tokens=update.num_tokens
        )
        return loss, self._gap(forward.logprobs.detach().cpu(), [batch.samples[index] for index in indices])

    def _gap(self, logprobs: torch.Tensor, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the largest difference to recorded log-probs, over loss tokens sampled from the published version."""
        if not samples:
            return torch.zeros(())
        versions = torch.cat([sample.policy_versions for sample in samples])
        comparable = torch.cat([sample.loss_mask for sample in samples])
        if self._version is not None:
            comparable &= versions == self._version
        differences = (logprobs - torch.cat([sample.logprobs for sample in samples])).abs()
        return torch.where(comparable, differences, 0.0).max()

    def _check_gap(self, gap: float, plan: StepPlan) -> None:
        """Prove weight sync, masks and temperature at every step: in float32 both sides compute the same numbers."""
        if self._records_are_old and self._version is not None and gap > MAX_LOGPROB_GAP:
            raise MismatchError(
                f"recorded log-probs must equal the learner's within {MAX_LOGPROB_GAP:g}, got a difference of "
                f"{gap:.3g} (step {plan.step}); the engine samples from other weights, or attends in another way"
            )

    def _row(self, microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> GroupRow:
        groups = prompt_groups(microbatch, samples, plan) or _EMPTY
        return self._networks.module.scorer.row(groups).to(self._device)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """A step's samples and what their tokens are compared with, in the plan's order."""

    plan: StepPlan
    samples: Sequence[Sample]
    targets: Sequence[SampleTargets]

    def select(self, indices: Sequence[int], device: torch.device) -> Targets:
        """Return the targets of some samples' tokens, one after another."""
        chosen = [self.targets[index] for index in indices]
        return Targets(
            old_logprobs=torch.cat([target.old_logprobs for target in chosen]).to(device),
            old_values=torch.cat([target.old_values for target in chosen]).to(device),
            advantages=torch.cat([target.advantages for target in chosen]).to(device),
            returns=torch.cat([target.returns for target in chosen]).to(device),
            loss_mask=torch.cat([self.samples[index].loss_mask for index in indices]).to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meter:
    """Diagnostics of one update, over all ranks."""

    shares: torch.Tensor
    """[5], see `SHARE_NAMES`."""
    ratio_max: float
    gap: float
    gradient_norm: float


def _no_targets(shape: torch.Size, device: torch.device) -> Targets:
    """Return the targets of an empty micro-batch: nothing counts."""
    zeros = torch.zeros(shape, device=device)
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    return Targets(old_logprobs=zeros, old_values=zeros, advantages=zeros, returns=zeros, loss_mask=mask)


def _summarise(meters: Sequence[_Meter], plan: StepPlan) -> dict[str, float]:
    """Return the step's metrics: means over its updates, maxima over all of them."""
    means = torch.stack([meter.shares for meter in meters]).mean(0).tolist()
    return dict(zip(SHARE_NAMES, means, strict=True)) | {
        "ratio_max": max(meter.ratio_max for meter in meters),
        "learner_logprob_gap": max(meter.gap for meter in meters),
        "grad_norm": sum(meter.gradient_norm for meter in meters) / len(meters),
        "learning_rate": plan.updates[-1].learning_rate,
        "num_tokens": float(sum(update.num_tokens for update in plan.updates if update.epoch == 0)),
    }
