"""From an algorithm's configuration to the functions that it names, built in or the user's own by import path.

A function of one's own has the signature of the built-in ones:

    def my_advantage(experience: Experience, algorithm: AlgorithmConfig) -> Advantages
    def my_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss
"""

from collections.abc import Callable
from typing import Any

from actors.plugins import import_function
from learner import estimators, losses
from learner.algorithm_config import AlgorithmConfig
from learner.estimators import Advantages, Experience
from learner.losses import LossInputs, PolicyLoss

Estimator = Callable[[Experience, AlgorithmConfig], Advantages]
PolicyLossFunction = Callable[[LossInputs, AlgorithmConfig], PolicyLoss]

ESTIMATORS: dict[str, Estimator] = {
    "gae": estimators.gae_estimator,
    "n_step": estimators.n_step_estimator,
    "vtrace": estimators.vtrace_estimator,
    "returns": estimators.returns_estimator,
    "leave_one_out": estimators.leave_one_out_estimator,
    "group": estimators.group_estimator,
}
"""By the name in `AlgorithmConfig.advantage`."""


def _ppo_clip(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    return losses.ppo_clip(
        inputs,
        clip_range=algorithm.clip_range,
        clip_range_high=algorithm.clip_range_high,
        dual_clip=algorithm.dual_clip,
        ratio=algorithm.ratio,
    )


def _cispo(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    return losses.cispo(inputs, clip_range=algorithm.clip_range, clip_range_high=algorithm.clip_range_high)


def _policy_gradient(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    return losses.policy_gradient(inputs)


LOSSES: dict[str, PolicyLossFunction] = {
    "policy_gradient": _policy_gradient,
    "ppo_clip": _ppo_clip,
    "cispo": _cispo,
}
"""By the name in `AlgorithmConfig.policy_loss`."""


def estimator_of(algorithm: AlgorithmConfig) -> Estimator:
    """Return the advantage estimator that a configuration names."""
    return ESTIMATORS.get(algorithm.advantage) or _own(algorithm.advantage)


def policy_loss_of(algorithm: AlgorithmConfig) -> PolicyLossFunction:
    """Return the policy loss that a configuration names."""
    return LOSSES.get(algorithm.policy_loss) or _own(algorithm.policy_loss)


def _own(path: str) -> Callable[..., Any]:
    return import_function(path)
