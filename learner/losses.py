"""PPO's losses, token by token, and the weights that make one number of them.

Tokens are flat: S response tokens, sequence after sequence.  A weight depends on the token's own sequence and on the
global counts of its minibatch only, so the sum over ranks and micro-batches is the loss of the whole minibatch, however
it was cut.

What differs from the paper: an optional second bound for negative advantages (dual clip), an upper clip of its own
(clip-higher), and a log-ratio held within +-30 so that a token with a hopeless ratio cannot make 0 * inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from learner.kl import k3

if TYPE_CHECKING:
    from learner.config import AlgorithmConfig

Aggregation = Literal["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum"]

_MAX_LOG_RATIO = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """What `ppo_clip` returns, all [S]."""

    loss: torch.Tensor
    """To be minimised; the only one with a gradient."""
    ratio: torch.Tensor
    """Probability under the current policy over that under the old one."""
    is_clipped: torch.Tensor
    """Bool: a clip is active, so the token's gradient is exactly 0."""
    approx_kl: torch.Tensor
    """k3 estimate of KL(old || current) from the old policy's samples."""


def ppo_clip(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Return the clipped surrogate loss of each token.

    -min(r A, clip(r, 1 - low, 1 + high) A), and where A < 0 at most -c A with `dual_clip` c.

    Args:
        logprobs: [S] of the current policy, with gradient.
        old_logprobs: [S] of the policy at the start of the step.
        advantages: [S].
        clip_range: Lower clip, and the upper one unless set apart.
        clip_range_high: Upper clip (DAPO, 2503.14476).
        dual_clip: Bound for negative advantages, > 1 (Ye et al. 2019, 1912.09729).

    Source:
        Schulman et al. 2017 (1707.06347), Eq. 7.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = (logprobs - old_logprobs).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_range, 1.0 + high) * advantages
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if dual_clip is not None:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > bound)
        loss, is_clipped = torch.where(beyond, bound, loss), is_clipped | beyond
    with torch.no_grad():
        approx_kl = k3(old_logprobs, logprobs)
    return PolicyLoss(loss=loss, ratio=ratio.detach(), is_clipped=is_clipped, approx_kl=approx_kl)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip_range: float | None
) -> torch.Tensor:
    """Return the value loss of each token, [S]: half the larger squared error of the value and of its clipped twin.

    0.5 max((V - R)^2, (V_old + clip(V - V_old, -eps, eps) - R)^2); without `clip_range` 0.5 (V - R)^2.

    Source:
        OpenAI baselines ppo2; "The N implementation details of RLHF with PPO", detail 19.
    """
    errors = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns).square())
    return 0.5 * errors


def aggregation_weights(
    lengths: Sequence[int], loss_mask: torch.Tensor, mode: Aggregation, *, total_tokens: int, total_sequences: int
) -> torch.Tensor:
    """Return each token's weight in the minibatch's loss.

    token_mean: 1 / N tokens; sequence_mean_token_mean: 1 / (B n_b), every sequence counts the same;
    sequence_mean_token_sum: 1 / B.  Two sequences of 1 and 3 tokens give .25 .25 .25 .25, or .5 .1667 .1667 .1667, or
    .5 .5 .5 .5.

    Args:
        lengths: Response tokens of each sequence here; they add up to S.
        loss_mask: [S] bool; masked tokens weigh 0.
        mode: `AlgorithmConfig.aggregation`.
        total_tokens: N, loss tokens of the whole minibatch over all ranks (`Update.num_tokens`).
        total_sequences: B, sequences of the whole minibatch over all ranks (`Update.num_sequences`).

    Returns:
        [S] float32.
    """
    if sum(lengths) != loss_mask.shape[0]:
        raise ValueError(f"lengths must add up to {loss_mask.shape[0]} tokens, got {sum(lengths)}")
    mask = loss_mask.double()
    if mode == "token_mean":
        weights = mask / total_tokens
    elif mode == "sequence_mean_token_sum":
        weights = mask / total_sequences
    else:
        sequences = mask.split(list(lengths))
        weights = torch.cat([row / (row.sum().clamp(min=1) * total_sequences) for row in sequences] or [mask])
    return weights.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What the current policy says about tokens, all [S] with gradient."""

    logprobs: torch.Tensor
    values: torch.Tensor
    entropy: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What was fixed before the first update of the step, all [S] without gradient."""

    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    """As the loss sees them: whitened where the configuration says so."""
    returns: torch.Tensor
    loss_mask: torch.Tensor
    """Bool: tokens of the policy's own."""


SHARE_NAMES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
"""Losses weighted as they are trained on; the last three are means over the minibatch's loss tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOLoss:
    """One micro-batch's share of a minibatch's loss, and of its diagnostics."""

    total: torch.Tensor
    """Scalar to go backward from."""
    shares: torch.Tensor
    """[5] float64, see `SHARE_NAMES`: they add up over ranks and micro-batches to the minibatch's figures."""
    ratio_max: torch.Tensor
    """Scalar; 0 without tokens."""


def ppo_loss(
    predictions: Predictions,
    targets: Targets,
    weights: torch.Tensor,
    *,
    algorithm: "AlgorithmConfig",
    total_tokens: int,
) -> PPOLoss:
    """Return policy loss + value_coef * value loss - entropy_coef * entropy, each summed with `weights`.

    Args:
        predictions: Of the current policy.
        targets: Fixed for the step.
        weights: [S] from `aggregation_weights`.
        algorithm: Clip ranges and coefficients.
        total_tokens: Loss tokens of the whole minibatch over all ranks.
    """
    policy = ppo_clip(
        predictions.logprobs,
        targets.old_logprobs,
        targets.advantages,
        clip_range=algorithm.clip_range,
        clip_range_high=algorithm.clip_range_high,
        dual_clip=algorithm.dual_clip,
    )
    values = value_loss(predictions.values, targets.old_values, targets.returns, clip_range=algorithm.value_clip_range)
    policy_total, value_total = (policy.loss * weights).sum(), (values * weights).sum()
    entropy_total = (predictions.entropy * weights).sum()
    means = [
        torch.where(targets.loss_mask, tokens.detach().double(), 0.0).sum() / total_tokens
        for tokens in (predictions.entropy, policy.approx_kl, policy.is_clipped)
    ]
    ratios = torch.where(targets.loss_mask, policy.ratio, 0.0)
    return PPOLoss(
        total=policy_total + algorithm.value_coef * value_total - algorithm.entropy_coef * entropy_total,
        shares=torch.stack([policy_total.detach().double(), value_total.detach().double(), *means]),
        ratio_max=ratios.max() if ratios.numel() else ratios.new_zeros(()),
    )
