"""Advantage estimators: from a batch's rewards and values to advantages and value targets.

Each takes the whole batch, because group and batch baselines need all of it, and every rank computes the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from learner import advantages as recursions
from learner.advantages import align_right, cut_right, group_relative, n_step_advantages, returns_to_go
from learner.algorithm_config import AlgorithmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch of B responses, group after group, before the first update; response b has R_b tokens."""

    group_sizes: tuple[int, ...]
    """Responses to each prompt; they add up to B."""
    rewards: Sequence[torch.Tensor]
    """For each response [R_b]: score (on the last token, or spread) and, where it is part of the reward, KL penalty."""
    values: Sequence[torch.Tensor]
    """For each response [R_b + 1]: of the state before each token and of the one after the last, which is 0 where the
    response ended its episode; all 0 without a value function."""
    log_ratios: Sequence[torch.Tensor]
    """For each response [R_b]: log of the old policy's probability over the sampling policy's."""
    baseline: float
    """Moving average of earlier steps' scores."""

    @property
    def sequence_returns(self) -> torch.Tensor:
        """Return [B], the sum of each response's rewards."""
        return torch.stack([row.sum() for row in self.rewards])


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What an estimator returns."""

    advantages: Sequence[torch.Tensor]
    """For each response [R_b]."""
    returns: Sequence[torch.Tensor] | None = None
    """For each response [R_b], what the value function is trained towards; None without one."""


def gae(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """Generalized advantage estimation; with lambda 1 the return minus the value.  Source: see `gae`."""
    rewards, values, discounts = _aligned(experience, algorithm)
    return _valued(recursions.gae(rewards, values, discounts, algorithm.gae_lambda), experience)


def n_step(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """N-step returns minus values.  Source: see `n_step_advantages`."""
    rewards, values, discounts = _aligned(experience, algorithm)
    return _valued(n_step_advantages(rewards, values, discounts, algorithm.n_step), experience)


def vtrace(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """V-trace for samples of another policy.  Source: see `vtrace`."""
    rewards, values, discounts = _aligned(experience, algorithm)
    traced = recursions.vtrace(
        rewards,
        values,
        discounts,
        align_right(experience.log_ratios),
        gae_lambda=algorithm.gae_lambda,
        rho_clip=algorithm.vtrace_rho,
        c_clip=algorithm.vtrace_c,
    )
    errors = _valued(traced.errors, experience)
    return Advantages(advantages=_cut(traced.advantages, experience), returns=errors.returns)


def returns(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """Discounted returns minus a baseline that is one number for a whole response.

    batch_mean and group_mean are means of the responses' undiscounted returns, ema that of earlier steps' scores.

    Source:
        Williams 1992; Hu 2025 (2501.03262) for group_mean.
    """
    rewards = align_right(experience.rewards)
    following = _cut(returns_to_go(rewards, torch.full_like(rewards, algorithm.gamma)), experience)
    baselines = _baselines(experience, algorithm)
    return Advantages(advantages=[row - b for row, b in zip(following, baselines, strict=True)])


def leave_one_out(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """A response's return minus the mean of the others to its prompt, at all its tokens.  Source: `leave_one_out`."""
    groups = experience.sequence_returns.split(list(experience.group_sizes))
    return _spread([recursions.leave_one_out(part) for part in groups], experience)


def group(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """A response's return relative to the responses to its prompt, at all of its tokens.  Source: `group_relative`."""
    groups = experience.sequence_returns.split(list(experience.group_sizes))
    return _spread([group_relative(part, scale_by_std=algorithm.scale_by_std) for part in groups], experience)


def _aligned(experience: Experience, algorithm: AlgorithmConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rewards [B, T], values [B, T + 1] and discounts [B, T], aligned at the responses' ends.

    What a recursion makes of the padding before a response's first token is never looked at.
    """
    rewards = align_right(experience.rewards)
    return rewards, align_right(experience.values), torch.full_like(rewards, algorithm.gamma)


def _cut(padded: torch.Tensor, experience: Experience) -> list[torch.Tensor]:
    return cut_right(padded, [row.shape[0] for row in experience.rewards])


def _valued(padded: torch.Tensor, experience: Experience) -> Advantages:
    advantages = _cut(padded, experience)
    returns = [a + v[:-1] for a, v in zip(advantages, experience.values, strict=True)]
    return Advantages(advantages=advantages, returns=returns)


def _spread(groups: Sequence[torch.Tensor], experience: Experience) -> Advantages:
    per_response = zip(torch.cat(list(groups)), experience.rewards, strict=True)
    return Advantages(advantages=[value.expand_as(row) for value, row in per_response])


def _baselines(experience: Experience, algorithm: AlgorithmConfig) -> torch.Tensor:
    """Return [B]; means in float64, so that equal returns have just their own value as mean."""
    returns = experience.sequence_returns
    if algorithm.baseline == "batch_mean":
        return returns.double().mean().to(returns.dtype).expand_as(returns)
    if algorithm.baseline == "group_mean":
        groups = returns.split(list(experience.group_sizes))
        return torch.cat([part.double().mean().to(part.dtype).expand_as(part) for part in groups])
    return torch.full_like(returns, experience.baseline if algorithm.baseline == "ema" else 0.0)
