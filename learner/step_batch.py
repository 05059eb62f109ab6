"""A step's samples with their targets, and the targets of one micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from learner.batch import StepPlan
from learner.objective import Targets
from learner.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """A step's samples and what their tokens are compared with, in the plan's order."""

    plan: StepPlan
    samples: Sequence[Sample]
    targets: Sequence[Targets]
    """Of each sample, [R] each."""
    is_only_update_on_policy: bool = False
    """Whether the current policy of the step's one update is the one that sampled, so that it is the old one."""

    def select(self, indices: Sequence[int], num_tokens: int, device: torch.device) -> Targets:
        """Return the targets of some samples' tokens, one after another; without samples tokens that do not count."""
        if not indices:
            zeros = torch.zeros(num_tokens, device=device)
            return Targets(**{field.name: zeros for field in fields(Targets)} | {"loss_mask": zeros.bool()})
        chosen = [self.targets[index] for index in indices]
        return Targets(
            **{
                field.name: torch.cat([getattr(target, field.name) for target in chosen]).to(device)
                for field in fields(Targets)
            }
        )
