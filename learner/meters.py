"""What the updates of a step measured, and the step's metrics made of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learner.algorithm_config import AlgorithmConfig
from learner.batch import StepPlan
from learner.objective import SHARE_NAMES
from learner.samples import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Diagnostics of one update, over all ranks."""

    shares: torch.Tensor
    """[6], see `SHARE_NAMES`."""
    ratio_max: float
    gap: float
    """Of the step's first update, else 0."""
    gradient_norm: float
    log_ratios: list[torch.Tensor]
    """This rank's log(learner / recorded) of loss tokens, of the step's first update."""

    def share(self, name: str) -> float:
        """Return one of `SHARE_NAMES`."""
        return float(self.shares[SHARE_NAMES.index(name)])


def summarise(meters: Sequence[Meter], plan: StepPlan, algorithm: AlgorithmConfig) -> dict[str, float]:
    """Return the step's metrics, of the losses that there are: means over its updates, maxima over all of them."""
    made = plan.updates[: len(meters)]
    means = torch.stack([meter.shares for meter in meters]).mean(0).tolist()
    shares = dict(zip(SHARE_NAMES, means, strict=True))
    is_absent = {"value_loss": not algorithm.needs_values, "kl_loss": algorithm.kl.placement != "loss"}
    return {name: share for name, share in shares.items() if not is_absent.get(name)} | {
        "num_updates": float(len(meters)),
        "ratio_max": max(meter.ratio_max for meter in meters),
        "learner_logprob_gap": max(meter.gap for meter in meters),
        "grad_norm": sum(meter.gradient_norm for meter in meters) / len(meters),
        "learning_rate": made[-1].learning_rate,
        "num_tokens": float(sum(update.num_tokens for update in made if update.epoch == 0)),
    }


def staleness(samples: Sequence[Sample], plan: StepPlan, max_staleness: int) -> dict[str, float]:
    """Return how many policy versions lie between sampling and learning, over the batch's loss tokens.

    Two tokens of version 3 and two of version 5 in step 6: staleness_0 0.5, staleness_2 0.5, mean 1, max 2.
    """
    mask = torch.cat([sample.loss_mask for sample in samples])
    ages = (plan.step - 1) - torch.cat([sample.policy_versions for sample in samples])[mask].long()
    shares = {f"staleness_{age}": float((ages == age).double().mean()) for age in range(max_staleness + 1)}
    return {"staleness_mean": float(ages.double().mean()), "staleness_max": float(ages.max())} | shares
