"""Keeps the mean cost of responses at or below a limit, by a Lagrange multiplier that follows the measured cost.

    max over policies, min over lambda >= 0:    E[R] - lambda (E[C] - limit)

    score = (R - lambda C) / (1 + lambda)                      what the policy is trained on
    log(lambda) <- log(lambda) + rate lambda (J - limit)       after each step; J: mean cost of the recent sequences

An example: limit 0, rate 0.1, lambda 1, recent costs 2 and -1.  A response with R = 3 and C = 2 scores
(3 - 2) / 2 = 0.5.  J is 0.5, so log(lambda) becomes 0.05 and lambda 1.0513.

Source:
    Safe RLHF (Dai et al. 2023, 2310.12773), section "Safe Reinforcement Learning".

Differs from the paper: R and C are combined before the advantage, not after it, which is the same where advantages are
linear in the score, and needs one value function instead of two; the multiplier moves after a step, not before it.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from reward.config import ConstraintConfig


class Constraint:
    """Owns the multiplier and the costs it follows."""

    def __init__(self, config: "ConstraintConfig") -> None:
        self._config = config
        self._log_multiplier = math.log(config.initial_lambda)
        self._recent: list[float] = []

    @property
    def multiplier(self) -> float:
        """Lambda, as the next step uses it."""
        return math.exp(self._log_multiplier)

    def combined(self, scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Return (R - lambda C) / (1 + lambda).

        Args:
            scores: [B] R.
            costs: [B] C; NaN where no cost applies, which counts as 0.
        """
        return (scores - self.multiplier * np.where(np.isnan(costs), 0.0, costs)) / (1.0 + self.multiplier)

    def update(self, costs: np.ndarray, *, step: int) -> None:
        """Take a step's costs into the window and move the multiplier.

        Args:
            costs: [B], in the order of identities; NaN where no cost applies, which is left out.
            step: From 1; the first `delay_steps` only fill the window.
        """
        config = self._config
        known: list[float] = costs[~np.isnan(costs)].tolist()
        self._recent = [*self._recent, *known][-max(config.window, len(known)) :]
        if not self._recent or step <= config.delay_steps:
            return
        excess = float(np.mean(self._recent)) - config.limit
        moved = self._log_multiplier + config.learning_rate * self.multiplier * excess
        self._log_multiplier = min(max(moved, math.log(config.min_lambda)), math.log(config.max_lambda))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, JSON-able; floats survive JSON exactly."""
        return {"log_lambda": self._log_multiplier, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""
        self._log_multiplier = float(state["log_lambda"])
        self._recent = list(state["recent"])
