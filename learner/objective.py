"""One micro-batch's share of a minibatch's loss: policy, value, KL and entropy terms, and what they look like."""

from dataclasses import dataclass

import torch

from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import policy_loss_of
from learner.kl import ESTIMATORS, k3
from learner.losses import MAX_LOG_RATIO, LossInputs, value_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What the current networks say about tokens, all [S] with gradient."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None
    """None without a value function."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What was fixed before the first update of the step, all [S] without gradient."""

    old_logprobs: torch.Tensor
    old_values: torch.Tensor
    advantages: torch.Tensor
    """As the loss sees them: whitened where the configuration says so."""
    returns: torch.Tensor
    ref_logprobs: torch.Tensor
    """0 without a reference policy."""
    importance: torch.Tensor
    """Off-policy weight of the policy loss."""
    loss_mask: torch.Tensor
    """Bool: tokens of the policy's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """How tokens are added up, the same on all ranks for one minibatch."""

    lengths: tuple[int, ...]
    """Tokens of each response here."""
    weights: torch.Tensor
    """[S], of `aggregation_weights`."""
    total_tokens: int
    """Loss tokens of the whole minibatch over all ranks."""
    kl_coef: float
    """Of the step."""


SHARE_NAMES = ("policy_loss", "value_loss", "kl_loss", "entropy", "approx_kl", "clip_fraction")
"""Losses weighted as they are trained on; the last three are means over the minibatch's loss tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinibatchLoss:
    """One micro-batch's share of a minibatch's loss, and of its diagnostics."""

    policy: torch.Tensor
    """Scalar to go backward from for the policy."""
    value: torch.Tensor | None
    """Scalar to go backward from for the value function; None without one."""
    shares: torch.Tensor
    """[6] float64, see `SHARE_NAMES`: they add up over ranks and micro-batches to the minibatch's figures."""
    ratio_max: torch.Tensor
    """Scalar; 0 without tokens."""


def minibatch_loss(
    predictions: Predictions, targets: Targets, weighting: Weighting, algorithm: AlgorithmConfig
) -> MinibatchLoss:
    """Return policy loss - entropy_coef * entropy + kl_coef * KL (placement loss), and value_coef * value loss.

    Each is summed with the weights; the policy loss is multiplied by the importance weights as well.
    """
    inputs = LossInputs(
        logprobs=predictions.logprobs,
        old_logprobs=targets.old_logprobs,
        advantages=targets.advantages,
        lengths=weighting.lengths,
        loss_mask=targets.loss_mask,
    )
    weights = weighting.weights
    policy = policy_loss_of(algorithm)(inputs, algorithm)
    policy_total = (policy.loss * weights * targets.importance).sum()
    entropy_total = (predictions.entropy * weights).sum()
    total = policy_total - algorithm.entropy_coef * entropy_total
    kl_total = torch.zeros_like(policy_total)
    if algorithm.kl.placement == "loss" and weighting.kl_coef > 0:
        kl_total = (_kl_terms(predictions.logprobs, targets, algorithm) * weights).sum()
        total = total + weighting.kl_coef * kl_total
    value_total = _value_total(predictions.values, targets, weights, algorithm)
    with torch.no_grad():
        approx_kl = k3(targets.old_logprobs, predictions.logprobs)
    means = [
        torch.where(targets.loss_mask, tokens.detach().double(), 0.0).sum() / weighting.total_tokens
        for tokens in (predictions.entropy, approx_kl, policy.is_clipped)
    ]
    losses = [policy_total, torch.zeros_like(policy_total) if value_total is None else value_total, kl_total]
    ratios = torch.where(targets.loss_mask, policy.ratio, 0.0)
    return MinibatchLoss(
        policy=total,
        value=None if value_total is None else algorithm.value_coef * value_total,
        shares=torch.stack([*(loss.detach().double() for loss in losses), *means]),
        ratio_max=ratios.max() if ratios.numel() else ratios.new_zeros(()),
    )


def _kl_terms(logprobs: torch.Tensor, targets: Targets, algorithm: AlgorithmConfig) -> torch.Tensor:
    # A token that the policy did not choose may be hopeless; it weighs 0, but 0 * inf is no number.
    current = torch.where(targets.loss_mask, logprobs, 0.0)
    reference, old = (torch.where(targets.loss_mask, one, 0.0) for one in (targets.ref_logprobs, targets.old_logprobs))
    terms = ESTIMATORS[algorithm.kl.estimator](current, reference)
    if not algorithm.kl.importance_weighted:
        return terms
    ratio = (current - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    # The mean of k2 is not the KL: only its own gradient is right, so the ratio must not add to it.
    return terms * (ratio.detach() if algorithm.kl.estimator == "k2" else ratio) * targets.importance


def _value_total(
    values: torch.Tensor | None, targets: Targets, weights: torch.Tensor, algorithm: AlgorithmConfig
) -> torch.Tensor | None:
    if values is None:
        return None
    losses = value_loss(values, targets.old_values, targets.returns, clip_range=algorithm.value_clip_range)
    return (losses * weights).sum()
