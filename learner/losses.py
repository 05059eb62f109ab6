"""Policy and value losses, token by token, and the weights that make one number of them.

Tokens are flat: S response tokens, sequence after sequence.  A weight depends on the token's own sequence and on the
global counts of its minibatch only, so the sum over ranks and micro-batches is the loss of the whole minibatch, however
it was cut.

What differs from the papers: a log-ratio is held within +-30, so that a token with a hopeless ratio cannot make
0 * inf; the ratio of a sequence is written token by token, with the value and the gradient of the sequence's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Aggregation = Literal[
    "token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm"
]
Ratio = Literal["token", "sequence", "sequence_mean"]

MAX_LOG_RATIO = 30.0
"""Bound of a log-ratio: a hopeless token must not make 0 * inf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a policy loss is computed from: whole responses, S tokens together."""

    logprobs: torch.Tensor
    """[S] of the current policy, with gradient."""
    old_logprobs: torch.Tensor
    """[S] of the policy at the start of the step."""
    advantages: torch.Tensor
    """[S]."""
    lengths: tuple[int, ...]
    """Tokens of each response; they add up to S."""
    loss_mask: torch.Tensor
    """[S] bool: tokens of the policy's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """What a policy loss returns, all [S]."""

    loss: torch.Tensor
    """To be minimised; the only one with a gradient."""
    ratio: torch.Tensor
    """Probability under the current policy over that under the old one, as the loss sees it."""
    is_clipped: torch.Tensor
    """Bool: a clip is active."""


def policy_gradient(inputs: LossInputs) -> PolicyLoss:
    """Return -A log pi of each token: REINFORCE, and the actor of A2C.

    Source:
        Williams 1992, sections 4 and 5; Mnih et al. 2016 (1602.01783).
    """
    with torch.no_grad():
        ratio = _log_ratio(inputs).exp()
    loss = -inputs.advantages * inputs.logprobs
    return PolicyLoss(loss=loss, ratio=ratio, is_clipped=torch.zeros_like(inputs.loss_mask))


def ppo_clip(
    inputs: LossInputs,
    *,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    ratio: Ratio = "token",
) -> PolicyLoss:
    """Return the clipped surrogate loss of each token.

    -min(r A, clip(r, 1 - low, 1 + high) A), and where A < 0 at most -c A with `dual_clip` c.  Where a clip is active
    the gradient is exactly 0.

    The ratio r of a token is pi / pi_old of the token, of its whole sequence, or the geometric mean over its sequence
    (GSPO).  The latter two are one number s for all tokens of a sequence; summed over a sequence ("sequence") or
    averaged over it ("sequence_mean"), loss and gradient are those of min(s A, clip(s) A), as long as the sequence has
    one advantage.

    Args:
        inputs: Of whole responses.
        clip_range: Lower clip, and the upper one unless set apart.
        clip_range_high: Upper clip (DAPO, 2503.14476).
        dual_clip: Bound for negative advantages, > 1 (Ye et al. 2019, 1912.09729).
        ratio: Of which probabilities.

    Source:
        Schulman et al. 2017 (1707.06347), Eq. 7; GSPO: Zheng et al. 2025 (2507.18071), Eq. 5, 7, 13 and 14.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    advantages = inputs.advantages
    ratios = _ratios(inputs, ratio)
    unclipped = -ratios * advantages
    clipped = -ratios.clamp(1.0 - clip_range, 1.0 + high) * advantages
    loss = torch.maximum(unclipped, clipped)
    is_clipped = clipped > unclipped
    if dual_clip is not None:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > bound)
        loss, is_clipped = torch.where(beyond, bound, loss), is_clipped | beyond
    if ratio == "sequence":
        loss = _shared(loss, inputs)
    return PolicyLoss(loss=loss, ratio=ratios.detach(), is_clipped=is_clipped)


def cispo(inputs: LossInputs, *, clip_range: float, clip_range_high: float | None = None) -> PolicyLoss:
    """Return -sg[clip(r, 1 - low, 1 + high)] A log pi of each token: weights are clipped, no token loses its gradient.

    Args:
        inputs: Of whole responses.
        clip_range: Lower clip, and the upper one unless set apart; 1 = no lower clip.
        clip_range_high: Upper clip.

    Source:
        MiniMax 2025 (2506.13585), Eq. 4 and 5.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    with torch.no_grad():
        ratio = _log_ratio(inputs).exp()
        weight = ratio.clamp(1.0 - clip_range, 1.0 + high)
    return PolicyLoss(loss=-weight * inputs.advantages * inputs.logprobs, ratio=ratio, is_clipped=weight != ratio)


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
    lengths: Sequence[int],
    loss_mask: torch.Tensor,
    mode: Aggregation,
    *,
    total_tokens: int,
    total_sequences: int,
    norm_tokens: int,
) -> torch.Tensor:
    """Return each token's weight in the minibatch's loss.

    token_mean: 1 / N tokens; sequence_mean_token_mean: 1 / (B n_b), every sequence counts the same;
    sequence_mean_token_sum: 1 / B; sequence_mean_token_sum_norm: 1 / (B L).  Two sequences of 1 and 3 tokens give
    .25 .25 .25 .25, or .5 .1667 .1667 .1667, or .5 .5 .5 .5, or with L = 10 .05 .05 .05 .05.

    Args:
        lengths: Response tokens of each sequence here; they add up to S.
        loss_mask: [S] bool; masked tokens weigh 0.
        mode: `AlgorithmConfig.aggregation`.
        total_tokens: N, loss tokens of the whole minibatch over all ranks (`Update.num_tokens`).
        total_sequences: B, sequences of the whole minibatch over all ranks (`Update.num_sequences`).
        norm_tokens: L, longest possible response.

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
    elif mode == "sequence_mean_token_sum_norm":
        weights = mask / (total_sequences * norm_tokens)
    else:
        sequences = mask.split(list(lengths))
        weights = torch.cat([row / (row.sum().clamp(min=1) * total_sequences) for row in sequences] or [mask])
    return weights.float()


def _log_ratio(inputs: LossInputs) -> torch.Tensor:
    return (inputs.logprobs - inputs.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _ratios(inputs: LossInputs, ratio: Ratio) -> torch.Tensor:
    """Return [S]; a sequence's ratio s is s exp(log pi - sg[log pi]) at each token: of value s, with a gradient."""
    if ratio == "token":
        return _log_ratio(inputs).exp()
    with torch.no_grad():
        terms = torch.where(inputs.loss_mask, inputs.logprobs - inputs.old_logprobs, 0.0)
        sums = sequence_sums(terms, inputs.lengths)
        if ratio == "sequence_mean":
            sums = sums / sequence_sums(inputs.loss_mask.to(terms.dtype), inputs.lengths).clamp(min=1)
        fixed = sums.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return fixed * (inputs.logprobs - inputs.logprobs.detach()).exp()


def _shared(loss: torch.Tensor, inputs: LossInputs) -> torch.Tensor:
    """Return losses that add up over a sequence to one token's value; the gradient stays."""
    counts = sequence_sums(inputs.loss_mask.to(loss.dtype), inputs.lengths).clamp(min=1)
    return loss - loss.detach() * (1 - 1 / counts)


def sequence_sums(values: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return, at each token, the sum over its sequence; [S]."""
    if not lengths:
        return values
    index = torch.repeat_interleave(torch.tensor(lengths, device=values.device))
    return values.new_zeros(len(lengths)).index_add(0, index, values)[index]
