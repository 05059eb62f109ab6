"""What reward-model training minimises, as objectives of `learner/training.py`.

    regression      (r - (rating - mean) / std)^2                  r: the head's output
    bradley_terry   -log s(r_chosen - r_rejected)                  s: sigmoid
    cost            -log s(C_less_safe - C_safer) - sum over both of log s(C) if it is unsafe, log s(-C) if it is safe

Source:
    Bradley-Terry: Stiennon et al. 2020 (2009.01325), Eq. 1.  Cost: Safe RLHF (Dai et al. 2023, 2310.12773), the loss of
    the cost model, whose sign tells safe from unsafe.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from learner.optimizer import OptimizerEngine
from reward.model import pad_rows

MICROBATCH_TOKENS = 8192
"""Padded tokens in one forward-backward."""


class Regression:
    """Objective: squared error on ratings standardised by the training part's moments."""

    microbatch_tokens = MICROBATCH_TOKENS

    def __init__(self, encoded: Sequence[list[int]], ratings: Sequence[float], device: torch.device) -> None:
        self._encoded = encoded
        self._device = device
        values = torch.tensor(ratings, dtype=torch.float32)
        self._targets = (values - values.mean()) / values.std(correction=0).clamp_min(1e-12)
        self.lengths = [len(ids) for ids in encoded]
        self.units = [1] * len(encoded)

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the summed squared errors of some texts."""
        scores = engine.forward(*pad_rows([self._encoded[index] for index in examples], device=self._device))
        return (scores.float() - self._targets[list(examples)].to(self._device)).square().sum()


class BradleyTerry:
    """Objective: minus the log-probability that the chosen response is preferred."""

    microbatch_tokens = MICROBATCH_TOKENS // 2  # two texts each

    def __init__(self, chosen: Sequence[list[int]], rejected: Sequence[list[int]], device: torch.device) -> None:
        self._chosen = chosen
        self._rejected = rejected
        self._device = device
        self.lengths = [max(len(a), len(b)) for a, b in zip(chosen, rejected, strict=True)]
        self.units = [1] * len(chosen)

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the summed losses of some pairs."""
        rows = [self._chosen[index] for index in examples] + [self._rejected[index] for index in examples]
        chosen, rejected = engine.forward(*pad_rows(rows, device=self._device)).float().chunk(2)
        return -F.logsigmoid(chosen - rejected).sum()


class CostModel:
    """Objective: rank the less safe response higher, and give unsafe ones a positive and safe ones a negative cost."""

    microbatch_tokens = MICROBATCH_TOKENS // 2  # two texts each

    def __init__(
        self,
        less_safe: Sequence[list[int]],
        safer: Sequence[list[int]],
        *,
        is_safe: Sequence[tuple[bool, bool]],
        device: torch.device,
    ) -> None:
        """Take encoded texts, and for each pair whether (the less safe one, the safer one) is safe."""
        self._less_safe = less_safe
        self._safer = safer
        self._device = device
        self._signs = torch.tensor([[-1.0 if safe else 1.0 for safe in pair] for pair in is_safe])
        self.lengths = [max(len(a), len(b)) for a, b in zip(less_safe, safer, strict=True)]
        self.units = [1] * len(less_safe)

    def loss_sum(self, engine: OptimizerEngine, examples: Sequence[int]) -> torch.Tensor:
        """Return the summed losses of some pairs."""
        rows = [self._less_safe[index] for index in examples] + [self._safer[index] for index in examples]
        costs = engine.forward(*pad_rows(rows, device=self._device)).float().reshape(2, -1)
        signs = self._signs[list(examples)].T.to(self._device)
        return -F.logsigmoid(costs[0] - costs[1]).sum() - F.logsigmoid(signs * costs).sum()
