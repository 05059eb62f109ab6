"""From scores to advantages: per-token rewards, the value after a response, the estimators' recursions, whitening.

Pure functions of tensors.  Time runs along the last dimension; any dimensions may stand before it.

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
GROUP_EPS = 1e-6
"""Added to a group's standard deviation, as in GRPO's published code."""


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
    _check_shapes(rewards, values, discounts)
    deltas = rewards + discounts * values[..., 1:] - values[..., :-1]
    return _discounted_sums(deltas, discounts * gae_lambda)


def returns_to_go(rewards: torch.Tensor, discounts: torch.Tensor) -> torch.Tensor:
    """Return what follows each action: G_t = r_t + discount_t G_{t+1}, G_T = 0.

    Args:
        rewards: [..., T], of taking action t.
        discounts: [..., T], gamma, or 0 where action t ended the episode.

    Returns:
        [..., T].

    Source:
        Williams 1992; Sutton and Barto 2018, Eq. 3.9.
    """
    return _discounted_sums(rewards, discounts)


def n_step_advantages(rewards: torch.Tensor, values: torch.Tensor, discounts: torch.Tensor, n: int) -> torch.Tensor:
    """Return n-step advantages: up to n rewards, then the value of the state reached, minus the value now.

    A_t = sum_{l<m} gamma^l delta_{t+l} with m = min(n, T - t) and delta as in `gae`; n = 1 is the temporal difference,
    n >= T is `gae` with lambda 1.

    Args:
        rewards: [..., T].
        values: [..., T + 1].
        discounts: [..., T].
        n: Rewards before the value, at least 1.

    Returns:
        [..., T].

    Source:
        Mnih et al. 2016 (1602.01783), Algorithm S3; Sutton and Barto 2018, Eq. 7.1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _check_shapes(rewards, values, discounts)
    length = rewards.shape[-1]
    targets = values[..., 1:]
    for _ in range(min(n, length)):  # the k-step target of state t from the (k-1)-step target of state t + 1
        targets = rewards + discounts * targets
        shifted, last = targets[..., 1:], values[..., -1:]
        previous, targets = targets, torch.cat([shifted, last], dim=-1)
    return previous - values[..., :-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class VTrace:
    """What `vtrace` returns, both [..., T]."""

    errors: torch.Tensor
    """v_t - V(s_t): how far the value is from its target."""
    advantages: torch.Tensor
    """Of the policy gradient, importance weight included."""


def vtrace(
    rewards: torch.Tensor,
    values: torch.Tensor,
    discounts: torch.Tensor,
    log_ratios: torch.Tensor,
    *,
    gae_lambda: float,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> VTrace:
    """Return V-trace targets and advantages for samples of another policy.

    v_t - V(s_t) = delta_t + discount_t c_t (v_{t+1} - V(s_{t+1})),
    delta_t = rho_t (r_t + discount_t V(s_{t+1}) - V(s_t)),  rho_t = min(rho_clip, ratio_t),
    c_t = lambda min(c_clip, ratio_t);  the advantage is rho_t (r_t + discount_t q_{t+1} - V(s_t)) with
    q = lambda v + (1 - lambda) V, which is the paper's v for lambda 1.  On-policy errors and advantages are `gae`.

    Args:
        rewards: [..., T].
        values: [..., T + 1].
        discounts: [..., T].
        log_ratios: [..., T], log of the target policy's probability over the sampling policy's.
        gae_lambda: lambda.
        rho_clip: Decides what the fixed point is: the value of the policy proportional to min(rho_clip mu, pi).
        c_clip: Decides how fast it is reached.

    Source:
        Espeholt et al. 2018 (1802.01561), Eq. 1 and section 4.2.
    """
    _check_shapes(rewards, values, discounts)
    ratios = log_ratios.exp()
    rho, traces = ratios.clamp(max=rho_clip), gae_lambda * ratios.clamp(max=c_clip)
    deltas = rho * (rewards + discounts * values[..., 1:] - values[..., :-1])
    errors = _discounted_sums(deltas, discounts * traces)
    targets = torch.cat([values[..., 1:-1] + gae_lambda * errors[..., 1:], values[..., -1:]], dim=-1)
    return VTrace(errors=errors, advantages=rho * (rewards + discounts * targets - values[..., :-1]))


def leave_one_out(scores: torch.Tensor) -> torch.Tensor:
    """Return each score minus the mean of the others: unbiased, because that mean does not depend on the sample.

    A_i = R_i - sum_{j != i} R_j / (K - 1) = K / (K - 1) (R_i - mean(R));  (1, 0, 0) -> (1, -.5, -.5).

    Args:
        scores: [K], of one prompt's responses, K >= 2.

    Source:
        Kool et al. 2019; Ahmadian et al. 2024 (2402.14740).
    """
    count = _group_size(scores)
    return (_centered(scores) * (count / (count - 1))).to(scores.dtype)


def group_relative(scores: torch.Tensor, *, scale_by_std: bool) -> torch.Tensor:
    """Return each score's distance from the group's mean, in standard deviations (GRPO) or as it is (Dr. GRPO).

    (R_i - mean(R)) / (std(R) + 1e-6) with the sample's standard deviation, K - 1 in the denominator;
    (1, 0, 0) -> (1.1547, -.5774, -.5774), or (.6667, -.3333, -.3333).

    Args:
        scores: [K], of one prompt's responses, K >= 2.
        scale_by_std: Divide by the standard deviation, which weighs prompts by how hard they are.

    Source:
        Shao et al. 2024 (2402.03300), section 4.1.2; Liu et al. 2025 (2503.20783), section 3.
    """
    _group_size(scores)
    centered = _centered(scores)
    scale = scores.double().std() + GROUP_EPS if scale_by_std else 1.0
    return (centered / scale).to(scores.dtype)


def align_right(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return rows of different lengths as one [B, longest], aligned at their ends, where recursions start; 0 before."""
    length = max(row.shape[0] for row in rows)
    padded = rows[0].new_zeros(len(rows), length)
    for number, row in enumerate(rows):
        padded[number, length - row.shape[0] :] = row
    return padded


def cut_right(padded: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """Return the rows that `align_right` put together."""
    return [row[padded.shape[1] - length :] for row, length in zip(padded, lengths, strict=True)]


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


def _discounted_sums(terms: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """Return x_t = terms_t + decays_t x_{t+1}, x_T = 0, [..., T]."""
    sums = torch.empty_like(terms)
    following = torch.zeros_like(terms[..., 0])
    for t in range(terms.shape[-1] - 1, -1, -1):
        following = terms[..., t] + decays[..., t] * following
        sums[..., t] = following
    return sums


def _check_shapes(rewards: torch.Tensor, values: torch.Tensor, discounts: torch.Tensor) -> None:
    if values.shape[-1] != rewards.shape[-1] + 1 or discounts.shape != rewards.shape:
        raise ValueError(
            f"values must be [..., T + 1] and discounts [..., T] for rewards [..., T], got {tuple(values.shape)}, "
            f"{tuple(discounts.shape)} and {tuple(rewards.shape)}"
        )


def _centered(scores: torch.Tensor) -> torch.Tensor:
    """Return scores minus their mean in float64: exactly 0 where they are equal, so that no rounding is scaled up."""
    wide = scores.double()
    return wide - wide.mean()


def _group_size(scores: torch.Tensor) -> int:
    if scores.ndim != 1 or scores.shape[0] < 2:
        raise ValueError(
            f"scores must be of at least 2 responses to one prompt, got shape {tuple(scores.shape)}; raise "
            "rollouts.samples_per_prompt"
        )
    return scores.shape[0]
