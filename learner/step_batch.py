"""A step's samples with their targets, and the targets of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learner.batch import StepPlan
from learner.experience import SampleTargets
from learner.objective import Targets
from learner.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """A step's samples and what their tokens are compared with, in the plan's order."""

    plan: StepPlan
    samples: Sequence[Sample]
    targets: Sequence[SampleTargets]
    is_only_update_on_policy: bool = False
    """Whether the current policy of the step's one update is the one that sampled, so that it is the old one."""

    def select(self, indices: Sequence[int], num_tokens: int, device: torch.device) -> Targets:
        """Return the targets of some samples' tokens, one after another."""
        if not indices:
            return _no_targets(num_tokens, device)
        chosen = [self.targets[index] for index in indices]
        return Targets(
            old_logprobs=torch.cat([target.old_logprobs for target in chosen]).to(device),
            old_values=torch.cat([target.old_values for target in chosen]).to(device),
            advantages=torch.cat([target.advantages for target in chosen]).to(device),
            returns=torch.cat([target.returns for target in chosen]).to(device),
            ref_logprobs=torch.cat([target.ref_logprobs for target in chosen]).to(device),
            importance=torch.cat([target.importance for target in chosen]).to(device),
            loss_mask=torch.cat([self.samples[index].loss_mask for index in indices]).to(device),
        )


def _no_targets(num_tokens: int, device: torch.device) -> Targets:
    """Return the targets of an empty micro-batch: nothing counts."""
    zeros = torch.zeros(num_tokens, device=device)
    mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    return Targets(
        old_logprobs=zeros,
        old_values=zeros,
        advantages=zeros,
        returns=zeros,
        ref_logprobs=zeros,
        importance=zeros,
        loss_mask=mask,
    )
