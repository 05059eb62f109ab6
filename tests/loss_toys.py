"""A minibatch of four sequences, every policy loss as it is meant to be used, and gradients by differences."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch

from learner.losses import LossInputs, PolicyLoss, aggregation_weights, cispo, policy_gradient, ppo_clip

PolicyLossFunction = Callable[[LossInputs], PolicyLoss]
Weights = Callable[..., torch.Tensor]
Scalar = Callable[[torch.Tensor], torch.Tensor]

LENGTHS = (3, 1, 4, 2)
ADVANTAGES = (1.5, -0.7, -1.2, 0.9)  # one a sequence, as the sequence's ratio asks for
NORM_TOKENS = 6
MODES = ("token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "sequence_mean_token_sum_norm")
CLIP, CLIP_HIGH, DUAL_CLIP = 0.2, 0.3, 1.8

LOSSES: dict[str, tuple[PolicyLossFunction, str]] = {
    "policy-gradient": (policy_gradient, "token_mean"),
    "ppo-clip": (partial(ppo_clip, clip_range=CLIP, clip_range_high=CLIP_HIGH, dual_clip=DUAL_CLIP), "token_mean"),
    "sequence": (partial(ppo_clip, clip_range=CLIP, ratio="sequence"), "sequence_mean_token_sum"),
    "gspo": (partial(ppo_clip, clip_range=CLIP, ratio="sequence_mean"), "sequence_mean_token_mean"),
    "cispo": (partial(cispo, clip_range=CLIP, clip_range_high=CLIP_HIGH), "token_mean"),
}
"""Each loss, with the aggregation that it is meant for."""


def minibatch(spread: float, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Return four sequences with one token that is not the policy's; `spread` scales the log-ratios."""
    generator = torch.Generator().manual_seed(11)
    num_tokens = sum(LENGTHS)
    old = -3 * torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    log_ratios = spread * (2 * torch.rand(num_tokens, generator=generator, dtype=torch.float64) - 1)
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[5] = False
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    return LossInputs(
        logprobs=(old + log_ratios).to(dtype),
        old_logprobs=old.to(dtype),
        advantages=advantages.to(dtype),
        lengths=LENGTHS,
        loss_mask=mask,
    )


def total(loss: PolicyLossFunction, inputs: LossInputs, mode: str) -> torch.Tensor:
    """Return the minibatch's loss as it is trained on."""
    weights = aggregation_weights(
        inputs.lengths,
        inputs.loss_mask,
        mode,
        total_tokens=int(inputs.loss_mask.sum()),
        total_sequences=len(inputs.lengths),
        norm_tokens=NORM_TOKENS,
    )
    return (loss(inputs).loss * weights.double()).sum()


def gradient(objective: Scalar, point: torch.Tensor) -> torch.Tensor:
    leaf = point.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf), leaf)[0]


def differences(objective: Scalar, point: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Return the gradient by central differences, float64."""
    flat = point.flatten()
    slopes = []
    for index in range(flat.numel()):
        shift = torch.zeros_like(flat)
        shift[index] = step
        up, down = (objective((flat + sign * shift).reshape(point.shape)) for sign in (1, -1))
        slopes.append((up - down).detach() / (2 * step))
    return torch.stack(slopes).reshape(point.shape)


def assert_is_gradient(actual: torch.Tensor, objective: Scalar, point: torch.Tensor) -> None:
    expected = differences(objective, point)
    assert expected.abs().max() > 1e-3, "a gradient of zero everywhere would prove nothing"
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-10)


def with_loss(result: PolicyLoss, loss: torch.Tensor) -> PolicyLoss:
    return dataclasses.replace(result, loss=loss)


GRID = torch.tensor([0.05, -0.1, 0.4, 1.5, -0.4, -0.5], dtype=torch.float64)
TARGETS = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0], dtype=torch.float64)


def slope_is_gradient(objective: Scalar, point: torch.Tensor) -> None:
    assert_is_gradient(gradient(objective, point), objective, point)
