"""Configuration of the offline algorithms that learn values: ILQL and token Q-learning."""

from typing import Literal

from pydantic import Field, model_validator

from actors.config import Config


class _ValueLearningConfig(Config):
    """What both algorithms have."""

    gamma: float = Field(default=0.99, gt=0, le=1)
    """Discount per token."""
    cql_coef: float = Field(default=0.1, ge=0)
    """Weight of the conservative term, -log softmax(Q)[a]: values of tokens that the data does not have stay low."""
    bc_coef: float = Field(default=1.0, ge=0)
    """Weight of -log pi(a|s): the policy that decoding starts from stays that of the data. 0 = the policy's own loss is
    off, while its trunk still learns values."""
    polyak: float = Field(default=0.005, gt=0, le=1)
    """Share of the Q heads that their target copies take over after each update."""
    guidance: float = Field(default=16.0, ge=0)
    """beta of decoding, pi(a|s) ~ pi_policy(a|s) exp(beta (Q(s,a) - V(s))); 0 = the policy as it is."""


class ILQLConfig(_ValueLearningConfig):
    """Implicit language Q-learning (Snell et al. 2022, arXiv 2206.11871)."""

    name: Literal["ilql"] = "ilql"
    """Algorithm."""
    tau: float = Field(default=0.7, gt=0, lt=1)
    """Expectile that V takes of Q over the data's tokens: 0.5 is their mean, near 1 their maximum."""
    awac_beta: float = Field(default=0.0, ge=0)
    """The policy's loss is weighted by exp(awac_beta (Q - V)), at most 20 (AWAC, arXiv 2006.09359); 0 = plain
    behaviour cloning."""

    @model_validator(mode="after")
    def _weights_are_used(self) -> "ILQLConfig":
        if self.awac_beta and not self.bc_coef:
            raise ValueError(
                f"awac_beta must be 0 with bc_coef 0, got {self.awac_beta}: it weighs a loss that is off; set bc_coef"
            )
        return self


class QLearningConfig(_ValueLearningConfig):
    """Token Q-learning on rated text: y = r + gamma max_a Q(s', a), with twin Q and a slow target copy."""

    name: Literal["q_learning"] = "q_learning"
    """Algorithm."""


ValueLearningConfig = ILQLConfig | QLearningConfig
"""Settings of either algorithm."""
