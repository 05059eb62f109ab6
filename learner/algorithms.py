"""From an algorithm's configuration to the functions that it names, built in or the user's own by import path.

A function of one's own has the signature of the built-in ones:

    def my_advantage(experience: Experience, algorithm: AlgorithmConfig) -> Advantages
    def my_loss(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss
"""

from collections.abc import Callable
from functools import lru_cache

from actors.plugins import import_function
from learner import losses
from learner.algorithm_config import AlgorithmConfig
from learner.estimators import Advantages, Experience
from learner.losses import LossInputs, PolicyLoss
from learner.parts import ADVANTAGES, POLICY_LOSSES

Estimator = Callable[[Experience, AlgorithmConfig], Advantages]
PolicyLossFunction = Callable[[LossInputs, AlgorithmConfig], PolicyLoss]

_function = lru_cache(maxsize=64)(import_function)


def estimator_of(algorithm: AlgorithmConfig) -> Estimator:
    """Return the advantage estimator that a configuration names."""
    part = ADVANTAGES.get(algorithm.advantage)
    return _function(algorithm.advantage if part is None else part.function)


def policy_loss_of(algorithm: AlgorithmConfig) -> PolicyLossFunction:
    """Return the policy loss that a configuration names."""
    return _function(POLICY_LOSSES.get(algorithm.policy_loss, algorithm.policy_loss))


def policy_gradient(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    """See `learner.losses.policy_gradient`."""
    return losses.policy_gradient(inputs)


def ppo_clip(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    """See `learner.losses.ppo_clip`."""
    return losses.ppo_clip(
        inputs,
        clip_range=algorithm.clip_range,
        clip_range_high=algorithm.clip_range_high,
        dual_clip=algorithm.dual_clip,
        ratio=algorithm.ratio,
    )


def cispo(inputs: LossInputs, algorithm: AlgorithmConfig) -> PolicyLoss:
    """See `learner.losses.cispo`."""
    return losses.cispo(inputs, clip_range=algorithm.clip_range, clip_range_high=algorithm.clip_range_high)
