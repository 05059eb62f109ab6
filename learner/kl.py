"""Distance to another policy: estimators of KL(policy || other) from samples, and control of the penalty's weight.

Which estimator where: in the reward k1, whose penalty has the right gradient through the policy-gradient theorem; in a
loss k2, whose own gradient is that of the KL; k3 for monitoring, because it is unbiased like k1 but never negative.  As
a loss k1 has no gradient in expectation, and k3 has that of KL(other || policy).  Multiplied by the ratio to the policy
that sampled all three have the gradient of the KL, k1 and k3 with the ratio's own gradient, k2 without it.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from learner.algorithm_config import KLConfig

_MAX_ERROR = 0.2
"""The controller reacts to a KL that is 20% off as it does to one that is 200% off."""


def k1(logprobs: "torch.Tensor", other_logprobs: "torch.Tensor") -> "torch.Tensor":
    """Return log(policy / other): unbiased, of either sign.  Source: Schulman 2020, "Approximating KL divergence"."""
    return logprobs - other_logprobs


def k2(logprobs: "torch.Tensor", other_logprobs: "torch.Tensor") -> "torch.Tensor":
    """Return log(policy / other)^2 / 2: biased a little, low variance.  Source: Schulman 2020."""
    return 0.5 * (logprobs - other_logprobs).square()


def k3(logprobs: "torch.Tensor", other_logprobs: "torch.Tensor") -> "torch.Tensor":
    """Return other / policy - 1 - log(other / policy): unbiased, never negative.  Source: Schulman 2020."""
    log_ratio = logprobs - other_logprobs
    return (-log_ratio).expm1() + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
"""By the name in `KLConfig.estimator`."""


class KLController(Protocol):
    """Owns the weight of the KL penalty."""

    @property
    def coef(self) -> float:
        """The weight that the next step uses."""

    def update(self, mean_kl: float, num_sequences: int) -> None:
        """Learn what a step measured: mean KL in nats per sequence, over so many sequences."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, JSON-able."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s result."""


class FixedKL:
    """A constant weight."""

    def __init__(self, coef: float) -> None:
        self._coef = coef

    @property
    def coef(self) -> float:
        """The constant."""
        return self._coef

    def update(self, mean_kl: float, num_sequences: int) -> None:
        """Check the measurement and change nothing."""
        _check_measurement(mean_kl, num_sequences)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the weight comes from the configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another controller."""
        if state:
            raise ValueError(f"the state of a fixed KL controller must be empty, got {dict(state)}; keep algorithm.kl")


class AdaptiveKL:
    """Moves the weight in proportion to how far the measured KL is from its target.

    e = clip(KL / target - 1, -0.2, 0.2);  coef <- coef (1 + e n / horizon), positive as long as 0.2 n < horizon.

    Source:
        Ziegler et al. 2019 (1909.08593), section 2.2.
    """

    def __init__(self, coef: float, *, target: float, horizon: int) -> None:
        self._coef, self._target, self._horizon = coef, target, horizon

    @property
    def coef(self) -> float:
        """The weight that the next step uses."""
        return self._coef

    def update(self, mean_kl: float, num_sequences: int) -> None:
        """Move the weight; see the class.

        Raises:
            ValueError: if the step has so many sequences that the weight could become 0 or negative.
        """
        _check_measurement(mean_kl, num_sequences)
        if _MAX_ERROR * num_sequences >= self._horizon:
            raise ValueError(
                f"algorithm.kl.horizon must be more than {_MAX_ERROR} times the sequences of a step, got "
                f"{self._horizon} with {num_sequences} sequences per step; set it to some 20 times them, "
                f"{20 * num_sequences}"
            )
        error = min(max(mean_kl / self._target - 1.0, -_MAX_ERROR), _MAX_ERROR)
        self._coef *= 1.0 + error * num_sequences / self._horizon

    def state_dict(self) -> dict[str, Any]:
        """Return the weight."""
        return {"coef": self._coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the weight."""
        if set(state) != {"coef"}:
            raise ValueError(f"the state of an adaptive KL controller must hold `coef`, got {dict(state)}")
        self._coef = float(state["coef"])


def make_kl_controller(config: "KLConfig") -> KLController:
    """Build the controller that `config` names."""
    if config.target is None or config.horizon is None:
        return FixedKL(config.coef)
    return AdaptiveKL(config.coef, target=config.target, horizon=config.horizon)


def _check_measurement(mean_kl: float, num_sequences: int) -> None:
    if not math.isfinite(mean_kl):
        raise ValueError(f"the measured KL must be finite, got {mean_kl} over {num_sequences} sequences")
