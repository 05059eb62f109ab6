"""From scores to advantages: per-token rewards, the value after a response, GAE, whitening.  Pure functions of tensors.

What differs from the papers:
- The end of an episode is written into the values (V = 0 after a terminal response), not into a discount of 0; both
  forms work and give the same numbers.
- Moments for whitening are taken over all tokens of the whole batch in two passes, in float64, so that they do not
  depend on how tokens are spread over ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

WHITEN_EPS = 1e-8
"""Inside the square root, as in OpenAI's code: a constant input whitens to 0, not to noise."""


def token_rewards(
    score: float, logprobs: torch.Tensor, ref_logprobs: torch.Tensor | None, kl_coef: float
) -> torch.Tensor:
    """Return one response's rewards: r_t = -kl_coef (logprob_t - ref_logprob_t), and the score on its last token.

    Args:
        score: The composed score of the response.
        logprobs: [R] of the policy that sampled it.
        ref_logprobs: [R] of the reference policy; None only without a penalty.
        kl_coef: Weight of the penalty; positive pulls the policy towards the reference.

    Returns:
        [R], of the dtype of `logprobs`.

    Raises:
        ValueError: on an empty response, or a penalty without a reference.

    Source:
        Ziegler et al. 2019 (1909.08593), Eq. 2.
    """
    if logprobs.shape[0] == 0:
        raise ValueError("a response must have at least one token, got none; its score would be lost")
    if ref_logprobs is None and kl_coef != 0:
        raise ValueError(f"ref_logprobs must be given with kl_coef {kl_coef}, got none; run with a reference policy")
    rewards = torch.zeros_like(logprobs) if ref_logprobs is None else -kl_coef * (logprobs - ref_logprobs)
    rewards[-1] += score
    return rewards


def is_terminal(finish_reason: str, *, missing_eos_penalty: float | None) -> bool:
    """Return whether a response ended its episode, so that nothing follows its last token.

    A response that hit the length limit would have gone on: it bootstraps, unless a penalty makes the limit part of the
    task.
    """
    return finish_reason != "length" or missing_eos_penalty is not None


def with_bootstrap(values: torch.Tensor, *, is_terminal: bool) -> torch.Tensor:
    """Return a response's values with the right last one: V(s_R) when it was cut off, 0 when it ended.

    Args:
        values: [R + 1], V(s_0) .. V(s_R); s_t is the prompt and t response tokens.
        is_terminal: See `is_terminal`.
    """
    return torch.cat([values[:-1], torch.zeros_like(values[-1:])]) if is_terminal else values


def gae(rewards: torch.Tensor, values: torch.Tensor, discounts: torch.Tensor, gae_lambda: float) -> torch.Tensor:
    """Return generalized advantage estimates; the returns are `advantages + values[..., :-1]`.

    A_t = delta_t + discount_t lambda A_{t+1},  delta_t = r_t + discount_t V(s_{t+1}) - V(s_t),  A_T = 0.

    Args:
        rewards: [..., T], of taking action t.
        values: [..., T + 1], of the state before action t, and of the state after the last one.
        discounts: [..., T], gamma, or 0 where action t ended the episode.
        gae_lambda: 0 = one-step temporal difference, 1 = discounted return minus value.

    Returns:
        [..., T].

    Source:
        Schulman et al. 2015 (1506.02438), Eq. 16.
    """
    if values.shape[-1] != rewards.shape[-1] + 1 or discounts.shape != rewards.shape:
        raise ValueError(
            f"values must be [..., T + 1] and discounts [..., T] for rewards [..., T], got {tuple(values.shape)}, "
            f"{tuple(discounts.shape)} and {tuple(rewards.shape)}"
        )
    deltas = rewards + discounts * values[..., 1:] - values[..., :-1]
    decays = discounts * gae_lambda
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[..., 0])
    for t in range(deltas.shape[-1] - 1, -1, -1):
        following = deltas[..., t] + decays[..., t] * following
        advantages[..., t] = following
    return advantages


def gae_ragged(
    rewards: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *, gamma: float, gae_lambda: float
) -> list[torch.Tensor]:
    """Return the advantages of responses of different lengths, as `gae` would one by one.

    They are computed together, aligned at their ends, where the recursion starts; what is left of a response's first
    token is never looked at.

    Args:
        rewards: For each response [R_b].
        values: For each response [R_b + 1].
        gamma: Discount.
        gae_lambda: See `gae`.

    Returns:
        For each response [R_b].
    """
    if not rewards:
        return []
    length = max(row.shape[0] for row in rewards)
    padded_rewards = rewards[0].new_zeros(len(rewards), length)
    padded_values = values[0].new_zeros(len(values), length + 1)
    for row, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        padded_rewards[row, length - reward.shape[0] :] = reward
        padded_values[row, length + 1 - value.shape[0] :] = value
    advantages = gae(padded_rewards, padded_values, torch.full_like(padded_rewards, gamma), gae_lambda)
    return [advantages[row, length - reward.shape[0] :] for row, reward in enumerate(rewards)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Of all tokens of a batch, over all ranks."""

    mean: float
    variance: float
    """Of the population: divided by the count, not by the count less one."""
    count: int


def _one_rank(values: torch.Tensor) -> torch.Tensor:
    return values


def token_moments(
    values: torch.Tensor, mask: torch.Tensor, *, all_reduce: Callable[[torch.Tensor], torch.Tensor] = _one_rank
) -> Moments:
    """Return mean and population variance of the masked values of all ranks.

    Two passes, first the global mean and then the squares around it, because E[x^2] - E[x]^2 cancels when the mean is
    large.  Every rank calls it, also one without tokens.

    Args:
        values: This rank's tokens, any shape.
        mask: True where a token counts, same shape.
        all_reduce: Sums a float64 tensor over ranks.

    Raises:
        ValueError: if no rank has a token.
    """
    chosen = values[mask].double()
    total, count = all_reduce(torch.stack([chosen.sum(), mask.sum().double()])).tolist()
    if count == 0:
        raise ValueError("a batch must have at least one loss token to take moments over, got none")
    mean = total / count
    squares = all_reduce((chosen - mean).square().sum().reshape(1)).item()
    return Moments(mean=mean, variance=squares / count, count=int(count))


def whiten(values: torch.Tensor, mean: float, variance: float, *, shift_mean: bool = True) -> torch.Tensor:
    """Return (values - mean) / sqrt(variance + 1e-8), plus the mean again without `shift_mean`.

    Source:
        lm-human-preferences `whiten`; "The N implementation details of RLHF with PPO", detail 18.
    """
    whitened = (values - mean) * (variance + WHITEN_EPS) ** -0.5
    return whitened if shift_mean else whitened + mean
