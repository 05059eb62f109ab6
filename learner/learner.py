"""One rank of the learner: the epoch loop over a step's batch.

What each rank computes is fixed by the plan; every denominator is the minibatch's global one, so parameters do not
depend on how many ranks or micro-batches there are.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from actors.config import PolicyConfig
from actors.faults import fault
from actors.memory import give_back, resident_bytes
from actors.policy import load_model, resolve_dtype
from actors.streams import StreamOffer
from actors.weights import Publication, WeightTransport
from learner import state
from learner.algorithm_config import AlgorithmConfig
from learner.batch import Microbatch, StepPlan, Update
from learner.config import LearnerConfig
from learner.experience import judge
from learner.first_pass import BatchScorer, Scored
from learner.losses import aggregation_weights
from learner.meters import Meter, staleness, summarise
from learner.model import Scoring
from learner.networks import Networks
from learner.objective import SHARE_NAMES, MinibatchLoss, Predictions, Weighting, minibatch_loss
from learner.off_policy import mismatch
from learner.optimizer import NonFiniteError
from learner.outlets import Streamed
from learner.publisher import DEFAULT_BUCKET_BYTES, Publisher, export_policy
from learner.reference import BaseReference, MovingReference
from learner.samples import Sample, read_samples, sample_indices
from learner.step_batch import StepBatch
from reward.credit_config import CreditConfig

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
        max_new_tokens: int,
        credit: CreditConfig | None = None,
        max_staleness: int = 0,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        sends_delta: bool = False,
        write_state: state.WriteShare = state.write,
    ) -> None:
        assert world_size == learner.num_ranks, f"the gang has {world_size} ranks, its config {learner.num_ranks}"
        if num_threads > 0:
            torch.set_num_threads(num_threads)
        torch.manual_seed(seed)  # new weights (adapters) are the same on all ranks
        self._model_dir = model_dir
        self._algorithm = algorithm
        self._rank = rank
        self._shown = f"rank {rank} of {world_size}, {algorithm.name}, {learner.backend}, {device}"
        self._device = torch.device(device)
        self._max_new_tokens, self._credit = max_new_tokens, credit
        self._max_staleness = max_staleness
        dtype = resolve_dtype(policy.dtype, self._device)
        self._is_exact = dtype == torch.float32
        self._records_are_old = _records_are_old(algorithm, is_exact=self._is_exact, max_staleness=max_staleness)
        self._networks = self._make_networks(policy, learner, temperature=temperature, dtype=dtype)
        self._version: int | None = None  # published last; None = the weights that were loaded
        self._publisher = Publisher(
            self._networks.module.policy,
            self._networks.policy,
            transport,
            bucket_bytes=bucket_bytes,
            has_delta=sends_delta,
        )
        self._moving = self._moving_reference(policy, learner, temperature)
        is_base = algorithm.reference.mode == "base"
        self._scorer = BatchScorer(
            self._networks,
            BaseReference(self._networks) if is_base else self._moving,
            records_are_old=self._records_are_old,
            kept_bytes=learner.first_epoch_bytes,
        )
        self._saver = state.Saver(write_state)

    def __repr__(self) -> str:
        """Say what is here, for process lists such as Ray's dashboard."""
        return f"LearnerRank({self._shown})"

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
        self._networks.reload()
        samples = read_samples(tables, plan)
        first_pass, kept = self._scorer.first_pass(samples, plan)
        targets, metrics = judge(samples, first_pass, plan, self._algorithm, self._credit)
        batch = StepBatch(
            plan=plan, samples=samples, targets=targets, is_only_update_on_policy=self._is_on_policy(samples, plan)
        )
        num_updates = self._num_updates()
        fault("learner.before_backward", self._rank)
        try:
            meters = self._updates(batch, kept)
        except NonFiniteError as error:
            return Skipped(reason=str(error), has_changed=self._num_updates() != num_updates)
        fault("learner.after_update", self._rank)
        log_ratios = self._log_ratios(meters[0], batch)
        self._check_gap(meters[0].gap, plan)
        if self._moving is not None:
            self._moving.follow(plan.step)
        if self._algorithm.reference.mode == "base":
            metrics["kl"] = metrics["reference_kl"]  # what reward workers measure where they have the reference
        metrics |= mismatch(log_ratios) | summarise(meters, plan, self._algorithm)
        metrics["resident_mb_learner"] = self._largest(resident_bytes() / 2**20)
        return metrics | (staleness(samples, plan, self._max_staleness) if self._max_staleness else {})

    def publish(
        self, version: int, incarnation: int, *, offer: StreamOffer | None = None, base: int | None = None
    ) -> Publication | Streamed | None:
        """Make the policy's weights available as `version`; rank 0 returns the announcement, other ranks None.

        See `Publisher.publish` for `offer` and `base`.
        """
        fault("learner.publish", self._rank)
        self._networks.reload()
        self._version = version
        return self._publisher.publish(version, incarnation, offer=offer, base=base)

    def stream_endpoint(self) -> tuple[str, int]:
        """Return the address and port where receivers of a stream meet rank 0; for rank 0 alone."""
        return self._publisher.endpoint()

    def begin_save(self, directory: str) -> None:
        """Copy this rank's share of the state, and begin to write it into a directory; steps may be made meanwhile.

        Raises:
            StateError: when the save before is not finished.
        """
        self._networks.reload()
        self._saver.begin(directory, self._stateful)

    def finish_save(self) -> list[str]:
        """Wait until this rank's share is written; return the names of its files.

        Raises:
            StateError: when no save was begun.
            OSError: what writing met; the learner is as good as before.
        """
        return self._saver.finish()

    def load_state(self, directory: str) -> None:
        """Continue from a saved state, of any number of ranks and any ZeRO stage."""
        self._networks.reload()
        state.load_state(directory, self._stateful)

    def export_policy(self, directory: str) -> None:
        """Write the policy as a Hugging Face model directory, with its tokenizer; rank 0 writes."""
        self._networks.reload()
        export_policy(self._publisher, directory, model_dir=self._model_dir)

    def ping(self) -> int:
        """Return the number of optimizer updates so far."""
        return self._networks.policy.num_updates

    def rest(self) -> None:
        """Give back what memory is not needed until something else is asked: on a GPU, all of it."""
        fault("learner.rest", self._rank)
        self._networks.offload()
        give_back()

    def close(self) -> None:
        """Free the engines."""
        self._networks.close()

    @property
    def _stateful(self) -> dict[str, state.Stateful]:
        """What a checkpoint holds, by name; the policy first."""
        moving = {} if self._moving is None else {"reference": self._moving}
        return {**self._networks.engines, **moving}

    def _make_networks(
        self, policy: PolicyConfig, learner: LearnerConfig, *, temperature: float, dtype: torch.dtype
    ) -> Networks:
        scoring = Scoring(
            temperature=temperature,
            chunk_tokens=learner.chunk_tokens,
            entropy_gradient=self._algorithm.entropy_coef > 0,
            kept_bytes=learner.softmax_bytes,
        )
        # ZeRO 3 cuts a model into shards on its way from main memory, so that no GPU holds it whole.
        is_cut = learner.backend == "zero" and learner.zero_stage == 3 and self._device.type != "cpu"
        return Networks(
            self._load_model(policy, dtype, torch.device("cpu") if is_cut else self._device),
            learner,
            scoring=scoring,
            dtype=dtype,
            rank=self._rank,
            has_values=self._algorithm.needs_values,
            device=self._device if is_cut else None,
        )

    def _load_model(self, policy: PolicyConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        return load_model(self._model_dir, dtype=dtype, device=device, trust_remote_code=policy.trust_remote_code)

    def _moving_reference(
        self, policy: PolicyConfig, learner: LearnerConfig, temperature: float
    ) -> MovingReference | None:
        config = self._algorithm.reference
        if config.mode in ("fixed", "base"):
            return None
        # Small changes of an average would be lost in half precision.
        dtype = torch.float32 if config.mode == "ema" else resolve_dtype(policy.dtype, self._device)
        return MovingReference(
            self._load_model(policy, dtype, self._device),
            self._publisher,
            config,
            temperature=temperature,
            chunk_tokens=learner.chunk_tokens,
            rank=self._rank,
            world_size=learner.num_ranks,
        )

    def _is_on_policy(self, samples: Sequence[Sample], plan: StepPlan) -> bool:
        """Return whether the step's one update starts from the policy that sampled: its ratio is 1 to the last bit."""
        if len(plan.updates) != 1 or not self._is_exact or self._algorithm.off_policy.old_logprobs != "auto":
            return False
        sampler = plan.step - 1  # version n is what step n left; not the version published last, which a replay skips
        return all(bool((sample.policy_versions == sampler).all()) for sample in samples)

    def _largest(self, value: float) -> float:
        """Return the largest of the ranks' values."""
        return float(self._networks.policy.all_reduce(torch.tensor([value], dtype=torch.float64), "max")[0])

    def _num_updates(self) -> int:
        """Return the number of updates of all engines."""
        return sum(engine.num_updates for engine in self._networks.engines.values())

    def _updates(self, batch: StepBatch, kept: deque[Scored]) -> list[Meter]:
        """Run the step's updates, until the policy is further from the old one than allowed."""
        meters: list[Meter] = []
        for update in batch.plan.updates:
            meters.append(self._update(update, batch, kept, is_first=not meters))
            limit = self._algorithm.target_kl
            if limit is not None and meters[-1].share("approx_kl") > limit:
                break
        return meters

    def _update(self, update: Update, batch: StepBatch, kept: deque[Scored], *, is_first: bool) -> Meter:
        """Run one minibatch's micro-batches and the optimizer update; the first ones are those that were kept."""
        sums = torch.zeros(len(SHARE_NAMES), dtype=torch.float64)
        maxima = torch.zeros(2, dtype=torch.float64)  # ratio, gap to the recorded log-probs
        log_ratios: list[torch.Tensor] = []
        for microbatch in update.ranks[self._rank]:
            # a kept graph is freed by its backward pass, so memory falls from one to the next
            scored = self._scorer.score(microbatch, batch.samples, batch.plan, kept)
            loss, logprobs = self._microbatch(microbatch, scored, update, batch)
            sums += loss.shares.cpu()
            members = [batch.samples[index] for index in sample_indices(microbatch, batch.plan)]
            gap = torch.zeros(())
            if is_first and members:
                differences = logprobs.cpu() - torch.cat([sample.logprobs for sample in members])
                gap = self._gap(differences, members, batch.plan)
                log_ratios.append(differences[torch.cat([sample.loss_mask for sample in members])])
            maxima = torch.maximum(maxima, torch.stack([loss.ratio_max.detach().cpu(), gap]).double())
        gradient_norm = self._networks.step(update.learning_rate)
        engine = self._networks.policy
        maxima = engine.all_reduce(maxima, "max")
        return Meter(
            shares=engine.all_reduce(sums),
            ratio_max=float(maxima[0]),
            gap=float(maxima[1]),
            gradient_norm=gradient_norm,
            log_ratios=log_ratios,
        )

    def _microbatch(
        self, microbatch: Microbatch, scored: Scored, update: Update, batch: StepBatch
    ) -> tuple[MinibatchLoss, torch.Tensor]:
        """Run one backward pass; return its loss and the current log-probs."""
        row, forward = scored.row, scored.forward
        values = forward.values[row.token_states] if self._networks.has_values else None
        predictions = Predictions(logprobs=forward.logprobs, entropy=forward.entropy, values=values)
        indices = sample_indices(microbatch, batch.plan)
        targets = batch.select(indices, row.targets.shape[0], self._device)
        if batch.is_only_update_on_policy:
            targets = replace(targets, old_logprobs=forward.logprobs.detach())
        weights = aggregation_weights(
            row.lengths,
            targets.loss_mask,
            self._algorithm.aggregation,
            total_tokens=update.num_tokens,
            total_sequences=update.num_sequences,
            norm_tokens=self._max_new_tokens,
        )
        weighting = Weighting(
            lengths=row.lengths, weights=weights, total_tokens=update.num_tokens, kl_coef=batch.plan.kl_coef
        )
        loss = minibatch_loss(predictions, targets, weighting, self._algorithm)
        self._networks.backward(loss)
        return loss, forward.logprobs.detach()

    def _log_ratios(self, first: Meter, batch: StepBatch) -> torch.Tensor:
        """Return log(learner / recorded) of loss tokens: all where the learner scored all, else the first minibatch."""
        if not self._records_are_old:
            differences = [t.old_logprobs - s.logprobs for t, s in zip(batch.targets, batch.samples, strict=True)]
            return torch.cat(differences)[torch.cat([sample.loss_mask for sample in batch.samples])]
        mine = torch.cat(first.log_ratios).numpy() if first.log_ratios else np.zeros(0, np.float32)
        return torch.from_numpy(np.concatenate(self._networks.policy.all_gather(mine)))

    def _gap(self, differences: torch.Tensor, samples: Sequence[Sample], plan: StepPlan) -> torch.Tensor:
        """Return the largest difference to recorded log-probs, over loss tokens of the step's first policy.

        Only samples that it generated from the first token to the last: a token that follows on older ones was sampled
        with their keys and values.  After a replay, whose weights were not published, no token is compared.
        """
        version = plan.step - 1  # what step n left is version n
        if self._version not in (None, version):
            return torch.zeros(())
        is_whole = [(sample.policy_versions == version).all().expand_as(sample.loss_mask) for sample in samples]
        comparable = torch.cat([sample.loss_mask for sample in samples]) & torch.cat(is_whole)
        return torch.where(comparable, differences.abs(), 0.0).max()

    def _check_gap(self, gap: float, plan: StepPlan) -> None:
        """Prove weight sync, masks and temperature at every step: in float32 both sides compute the same numbers."""
        if self._is_exact and self._version is not None and gap > MAX_LOGPROB_GAP:
            raise MismatchError(
                f"recorded log-probs must equal the learner's within {MAX_LOGPROB_GAP:g}, got a difference of "
                f"{gap:.3g} (step {plan.step}); the engine samples from other weights, or attends in another way"
            )


def _records_are_old(algorithm: AlgorithmConfig, *, is_exact: bool, max_staleness: int) -> bool:
    """Return whether recorded log-probs stand for the old policy's.

    Not where they are of older policies, and not in half precision, where they are the engine's own.
    """
    setting = algorithm.off_policy.old_logprobs
    return is_exact and max_staleness == 0 if setting == "auto" else setting == "recorded"
