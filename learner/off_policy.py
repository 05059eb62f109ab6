"""Samples of another policy: importance weights, masks, and how far apart the two policies are.

Three policies meet in a step: the one that sampled (behaviour, recorded with each token), the one at the start of the
step (old), the current one.  The policy loss takes care of current / old; here is old / behaviour.  Weights are numbers
without gradient, and a masked token weighs 0, in a sum whose denominator stays.

    token ratios of one response   1.1  1.1  3.0      geometric mean 1.54, product 3.63
    weight token, max 2            1.1  1.1  2.0      truncated importance sampling (Yao et al. 2025)
    weight sequence, max 2         2.0  2.0  2.0      less biased, more variance
    mask token, 0.5 to 2           1.1  1.1  0        IcePop (Ling team 2025), here after the truncation
    mask sequence, 0.999 to 1.001  0    0    0        the geometric mean decides for all tokens
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from learner.losses import MAX_LOG_RATIO, sequence_sums


def importance_weights(
    old_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    lengths: Sequence[int],
    loss_mask: torch.Tensor,
    *,
    weight: Literal["none", "token", "sequence"],
    max_weight: float | None,
    mask: Literal["none", "token", "sequence"],
    mask_range: tuple[float, float] | None,
) -> torch.Tensor:
    """Return each token's factor of the policy loss; see the module.

    Args:
        old_logprobs: [S] of the policy at the start of the step.
        behaviour_logprobs: [S] as recorded when the tokens were sampled.
        lengths: Tokens of each response; they add up to S.
        loss_mask: [S] bool; other tokens do not count in a sequence's ratio.
        weight: none = 1, token = old / behaviour, sequence = its product over the sequence.
        max_weight: Truncation; None = none (decoupled PPO).
        mask: token: outside the range a token weighs 0; sequence: by the geometric mean, all tokens of the sequence.
        mask_range: Lower and upper bound, both still inside.

    Returns:
        [S], detached.

    Source:
        Decoupled PPO: Hilton et al. 2021 (2110.00641), Eq. 3; truncation: Ionides 2008.
    """
    with torch.no_grad():
        log_ratios = torch.where(loss_mask, old_logprobs - behaviour_logprobs, 0.0)
        if weight == "none":
            weights = torch.ones_like(log_ratios)
        else:
            chosen = log_ratios if weight == "token" else sequence_sums(log_ratios, lengths)
            weights = (
                chosen.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
                .exp()
                .clamp(max=math.inf if max_weight is None else max_weight)
            )
        if mask == "none" or mask_range is None:
            return weights
        if mask == "sequence":
            counts = sequence_sums(loss_mask.to(log_ratios.dtype), lengths).clamp(min=1)
            log_ratios = sequence_sums(log_ratios, lengths) / counts
        ratios = log_ratios.exp()
        return torch.where((ratios >= mask_range[0]) & (ratios <= mask_range[1]), weights, 0.0)


def mismatch(log_ratios: torch.Tensor) -> dict[str, float]:
    """Return how far the sampling policy is from the learner's, over the loss tokens of a batch.

    Args:
        log_ratios: [N], log of the learner's probability over the recorded one, of each sampled token.

    Returns:
        mismatch_k1, mismatch_k3: estimates of KL(sampling || learner), nats per token; mismatch_p99: 99th percentile
        of the absolute log-ratio; mismatch_ratio_max: largest ratio; mismatch_ess: effective sample size of the
        importance weights as a share of the tokens, 1 = all alike.

    Source:
        Schulman 2020, "Approximating KL divergence"; Kong 1992 for the effective sample size.
    """
    wide = log_ratios.double()
    if not wide.numel():
        return dict.fromkeys(MISMATCH_NAMES, 0.0) | {"mismatch_ess": 1.0}
    ratios = wide.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    figures = (
        -wide.mean(),
        (ratios - 1 - wide).mean(),
        _quantile(wide.abs(), 0.99),
        ratios.max(),
        ratios.sum().square() / (ratios.square().sum() * ratios.numel()),
    )
    return {name: float(figure) for name, figure in zip(MISMATCH_NAMES, figures, strict=True)}


MISMATCH_NAMES = ("mismatch_k1", "mismatch_k3", "mismatch_p99", "mismatch_ratio_max", "mismatch_ess")


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """Return the smallest value that `share` of the values do not exceed; torch's quantile takes 2^24 at most."""
    rank = max(1, -int(-values.numel() * share // 1))
    return values.kthvalue(min(rank, values.numel())).values
