"""What the networks say about a step's batch before its first update: values, old and reference log-probs.

Two ways to the same numbers:

* a pass without gradient over the whole batch, the work shared over the ranks;
* where the step's first update is of the whole batch, its own forward passes: their graphs are kept until the targets
  are known, so nothing is computed twice.  They hold memory, so only the first micro-batches within
  `learner.first_epoch_tokens` are kept; the rest takes the other way.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from actors.rows import GroupRow, PromptGroup, split_responses
from learner.batch import Microbatch, StepPlan
from learner.experience import FirstPass
from learner.networks import Forward, Networks
from learner.reference import Reference
from learner.samples import Sample, prompt_groups, sample_indices

_EMPTY = (PromptGroup(prompt_ids=[0], responses=[[0]]),)
"""What an empty micro-batch computes, with weight 0: sharded parameters are gathered by all ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A micro-batch and what the current networks say about it, with gradient."""

    row: GroupRow
    forward: Forward


class BatchScorer:
    """Runs a rank's micro-batches through its networks.

    Args:
        networks: the rank's.
        reference: one that lives with the learner, or None.
        records_are_old: whether recorded log-probs are the old policy's.
        kept_tokens: trunk tokens whose graphs may be kept.
    """

    def __init__(
        self, networks: Networks, reference: Reference | None, *, records_are_old: bool, kept_tokens: int
    ) -> None:
        self._networks = networks
        self._reference = reference
        self._has_logprobs = not records_are_old
        self._needs_forward = networks.has_values or self._has_logprobs
        self._kept_tokens = kept_tokens if self._needs_forward and networks.keeps_graphs else 0

    def score(self, microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> Scored:
        """Run one micro-batch, with gradient."""
        row = self._row(microbatch, samples, plan)
        return Scored(row=row, forward=self._networks.forward(row))

    def first_pass(self, samples: Sequence[Sample], plan: StepPlan) -> tuple[list[FirstPass], deque[Scored]]:
        """Compute what the step's targets need; collective.

        Returns:
            of every sample what the networks say, and this rank's first micro-batches of the first update, in order,
            whose graphs are kept.
        """
        kept: deque[Scored] = deque()
        if not self._needs_forward and self._reference is None:
            return [_without_networks(sample) for sample in samples], kept
        rank = self._networks.policy.rank
        budget = self._kept_tokens if plan.updates[0].ranks == plan.value_ranks else 0
        mine: dict[int, FirstPass] = {}
        for microbatch in plan.value_ranks[rank]:
            row = self._row(microbatch, samples, plan)
            budget -= row.input_ids.numel()
            forward = None
            if self._needs_forward and budget >= 0:
                occupied = sum(self._networks.softmax_bytes(scored.row) for scored in kept)
                forward = self._networks.forward(row, occupied_bytes=occupied)
                kept.append(Scored(row=row, forward=forward))
            elif self._needs_forward:
                with torch.no_grad():
                    forward = self._networks.forward(row, has_tokens=self._has_logprobs)
            indices = sample_indices(microbatch, plan)
            mine |= dict(zip(indices, self._parts(row, forward, [samples[i] for i in indices]), strict=True))
        merged: dict[int, FirstPass] = {}
        for part_of_rank in self._networks.policy.all_gather(mine):
            merged |= part_of_rank
        return [merged[index] for index in range(len(samples))], kept

    def _parts(self, row: GroupRow, forward: Forward | None, members: Sequence[Sample]) -> list[FirstPass]:
        """Return what a row's responses are told; an empty micro-batch's has no members, and the zips drop it."""
        parts = [_without_networks(member) for member in members]
        if forward is not None and self._networks.has_values:
            values = _split(forward.values, [length + 1 for length in row.lengths])
            parts = [replace(part, values=value) for part, value in zip(parts, values, strict=False)]
        if forward is not None and self._has_logprobs:
            old = _split(forward.logprobs, row.lengths)
            parts = [replace(part, logprobs=logprobs) for part, logprobs in zip(parts, old, strict=False)]
        if self._reference is not None:
            theirs = _split(self._reference.logprobs(row), row.lengths)
            parts = [replace(part, ref_logprobs=logprobs) for part, logprobs in zip(parts, theirs, strict=False)]
        return parts

    def _row(self, microbatch: Microbatch, samples: Sequence[Sample], plan: StepPlan) -> GroupRow:
        groups = prompt_groups(microbatch, samples, plan) or _EMPTY
        return self._networks.module.scorer.row(groups).to(self._networks.device)


def _split(values: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return split_responses(values.detach().cpu(), lengths)


def _without_networks(sample: Sample) -> FirstPass:
    return FirstPass(values=torch.zeros(sample.logprobs.shape[0] + 1))
