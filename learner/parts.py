"""The parts that a configuration can name: advantage estimators and policy losses, by import path.

Data only, so that a configuration is checked without torch; `learner/algorithms.py` turns a name into its function.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantagePart:
    """An advantage estimator, and what others must know of it."""

    function: str
    """`module:function` with the signature of `learner.algorithms.Estimator`."""
    has_values: bool = False
    """Whether it needs a value function and returns what that is trained towards."""
    is_discounted: bool = True
    """Whether it reads `gamma`."""
    compares_group: bool = False
    """Whether a response's advantage is one number, relative to the other answers to its prompt."""


ADVANTAGES: Mapping[str, AdvantagePart] = {
    "gae": AdvantagePart(function="learner.estimators:gae", has_values=True),
    "n_step": AdvantagePart(function="learner.estimators:n_step", has_values=True),
    "vtrace": AdvantagePart(function="learner.estimators:vtrace", has_values=True),
    "returns": AdvantagePart(function="learner.estimators:returns"),
    "leave_one_out": AdvantagePart(
        function="learner.estimators:leave_one_out", is_discounted=False, compares_group=True
    ),
    "group": AdvantagePart(function="learner.estimators:group", is_discounted=False, compares_group=True),
}
"""By the name in `AlgorithmConfig.advantage`."""

POLICY_LOSSES: Mapping[str, str] = {
    "policy_gradient": "learner.algorithms:policy_gradient",
    "ppo_clip": "learner.algorithms:ppo_clip",
    "cispo": "learner.algorithms:cispo",
}
"""By the name in `AlgorithmConfig.policy_loss`: `module:function` of `learner.algorithms.PolicyLossFunction`."""

_PLUGIN = re.compile(r"[\w.]+:\w+")


def is_plugin(name: str) -> bool:
    """Return whether a part is named by import path."""
    return _PLUGIN.fullmatch(name) is not None
