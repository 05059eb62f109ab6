"""C1 and C2: a loss's gradient is the slope of its value, and REINFORCE's gradient at the old policy."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from learner.kl import k1, k2, k3
from learner.losses import LossInputs, PolicyLoss, policy_gradient, value_loss
from tests.checks import Case, Check, with_twins
from tests.loss_toys import (
    CLIP,
    CLIP_HIGH,
    GRID,
    LENGTHS,
    LOSSES,
    TARGETS,
    PolicyLossFunction,
    assert_is_gradient,
    gradient,
    minibatch,
    slope_is_gradient,
    total,
    with_loss,
)

# C1: autograd of every loss is the slope of its value, and exactly 0 where a clip is active.


def policy_loss_has_its_slope(loss: PolicyLossFunction, mode: str) -> None:
    """Log-ratios of both signs, within the clips and far beyond them; none of them lies on a kink."""
    for spread in (0.1, 1.5):
        inputs = minibatch(spread)
        point = inputs.logprobs

        def objective(logprobs: torch.Tensor, inputs: LossInputs = inputs) -> torch.Tensor:
            return total(loss, dataclasses.replace(inputs, logprobs=logprobs), mode)

        slope_is_gradient(objective, point)
        leaf = point.clone().requires_grad_()
        result = loss(dataclasses.replace(inputs, logprobs=leaf))
        result.loss[inputs.loss_mask].sum().backward()
        is_clipped = result.is_clipped & inputs.loss_mask
        assert (leaf.grad[is_clipped] == 0).all()
        assert (leaf.grad[inputs.loss_mask & ~is_clipped] != 0).all()
        if spread > 1 and loss is not policy_gradient:
            assert is_clipped.any(), "no clip was active: the check looked at one branch only"


def cispo_has_the_slope_of_its_surrogate(loss: PolicyLossFunction) -> None:
    """The clipped ratio is a constant: the slope is that of -ratio0 A logprob with ratio0 fixed at the point."""
    inputs = minibatch(1.5)
    ratio = (inputs.logprobs - inputs.old_logprobs).exp().clamp(1 - CLIP, 1 + CLIP_HIGH)
    assert (ratio == 1 + CLIP_HIGH).any()
    assert (ratio == 1 - CLIP).any()

    def surrogate(logprobs: torch.Tensor) -> torch.Tensor:
        losses = -ratio * inputs.advantages * logprobs
        return total(lambda _: PolicyLoss(loss=losses, ratio=ratio, is_clipped=ratio > 9), inputs, "token_mean")

    actual = gradient(lambda p: total(loss, dataclasses.replace(inputs, logprobs=p), "token_mean"), inputs.logprobs)
    assert_is_gradient(actual, surrogate, inputs.logprobs)


def straight_through(loss: PolicyLossFunction) -> PolicyLossFunction:
    """Right value, but the gradient goes through the clip as if there were none."""

    def twin(inputs: LossInputs) -> PolicyLoss:
        result = loss(inputs)
        through = -(inputs.logprobs - inputs.old_logprobs).exp() * inputs.advantages
        return with_loss(result, result.loss.detach() + through - through.detach())

    return twin


def ratio_of_one_in_the_gradient(loss: PolicyLossFunction) -> PolicyLossFunction:
    """Right value, but the gradient is that of -A logprob: the ratio was detached in it."""

    def twin(inputs: LossInputs) -> PolicyLoss:
        result = loss(inputs)
        through = -inputs.advantages * inputs.logprobs
        return with_loss(result, result.loss.detach() + through - through.detach())

    return twin


def fully_detached(loss: PolicyLossFunction) -> PolicyLossFunction:
    return lambda inputs: with_loss(loss(inputs), loss(inputs).loss.detach() + 0 * inputs.logprobs)


def not_detached_cispo(inputs: LossInputs) -> PolicyLoss:
    ratio = (inputs.logprobs - inputs.old_logprobs).exp().clamp(1 - CLIP, 1 + CLIP_HIGH)
    return with_loss(LOSSES["cispo"][0](inputs), -ratio * inputs.advantages * inputs.logprobs)


def of_the_other_tokens(loss: PolicyLossFunction) -> PolicyLossFunction:
    """The ratio of a sequence is spread over its tokens with the next token's gradient: shifted by one."""

    def twin(inputs: LossInputs) -> PolicyLoss:
        result = loss(inputs)
        through = result.ratio * -inputs.advantages * inputs.logprobs.roll(1)
        return with_loss(result, result.loss.detach() + through - through.detach())

    return twin


def value_loss_has_its_slope(loss: Callable[..., torch.Tensor]) -> None:
    for clip_range in (0.3, None):

        def objective(values: torch.Tensor, clip_range: float | None = clip_range) -> torch.Tensor:
            return loss(values, torch.zeros_like(values), TARGETS, clip_range=clip_range).sum()

        slope_is_gradient(objective, GRID)


def half_detached_value_loss(values, old_values, returns, *, clip_range):
    result = value_loss(values, old_values, returns, clip_range=clip_range)
    through = 0.5 * (values - returns).square()
    return result.detach() + through - through.detach() + (0 if clip_range else values - values.detach())


def estimators_have_their_slope(estimators: Sequence[Callable[..., torch.Tensor]]) -> None:
    for estimator in estimators:
        slope_is_gradient(lambda logprobs, kl=estimator: (TARGETS * kl(logprobs, -GRID)).sum(), GRID)


# C2: at the old policy all policy losses have the gradient of REINFORCE with that advantage, which is A2C's.


def is_reinforce_at_the_old_policy(loss: PolicyLossFunction, mode: str) -> None:
    inputs = minibatch(0.0)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(sum(LENGTHS), 5, generator=generator, dtype=torch.float64)
    actions = torch.randint(5, (sum(LENGTHS), 1), generator=generator)

    def logprobs_of(logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1).gather(-1, actions)[:, 0]

    old = logprobs_of(logits)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return total(loss, dataclasses.replace(inputs, logprobs=logprobs_of(logits), old_logprobs=old), mode)

    # By hand: d(-A log p)/d logits = -A (one-hot - p), with the weight of the aggregation.
    ones = PolicyLoss(loss=torch.ones_like(old), ratio=old, is_clipped=inputs.loss_mask)
    weights = gradient(lambda scale: total(lambda _: with_loss(ones, scale), inputs, mode), torch.ones_like(old))
    scores = F.one_hot(actions[:, 0], 5) - logits.softmax(-1)
    expected = -(inputs.advantages * weights)[:, None] * scores
    torch.testing.assert_close(gradient(objective, logits), expected, rtol=1e-12, atol=1e-14)


def at_an_older_policy(loss: PolicyLossFunction) -> PolicyLossFunction:
    return lambda inputs: loss(dataclasses.replace(inputs, old_logprobs=inputs.old_logprobs - 0.1))


def missing_detach(loss: PolicyLossFunction) -> PolicyLossFunction:
    """The old log-probs carry a gradient too: at ratio 1 nothing is left of it."""

    def twin(inputs: LossInputs) -> PolicyLoss:
        live = inputs.logprobs - (inputs.logprobs.detach() - inputs.old_logprobs)
        return loss(dataclasses.replace(inputs, old_logprobs=live))

    return twin


def shifted_mask(loss: PolicyLossFunction) -> PolicyLossFunction:
    return lambda inputs: with_loss(loss(inputs), loss(inputs).loss * inputs.loss_mask.roll(1))


def doubled_ratio(loss: PolicyLossFunction) -> PolicyLossFunction:
    """The ratio is applied to the loss a second time, as when a sampling weight is counted twice."""

    def twin(inputs: LossInputs) -> PolicyLoss:
        result = loss(inputs)
        return with_loss(result, result.loss * (inputs.logprobs - inputs.old_logprobs).exp())

    return twin


def policy_loss_checks() -> list[Check]:
    checks = []
    for name, (loss, mode) in LOSSES.items():
        twins = {"detached": fully_detached(loss), "shifted-by-one": of_the_other_tokens(loss)}
        if name in ("ppo-clip", "sequence", "gspo"):
            twins |= {"straight-through": straight_through(loss), "ratio-detached": ratio_of_one_in_the_gradient(loss)}
        run: Callable[[PolicyLossFunction], None] = partial(policy_loss_has_its_slope, mode=mode)
        if name == "cispo":
            run = cispo_has_the_slope_of_its_surrogate
            twins |= {"not-detached": not_detached_cispo}
        checks.append(Check(id=f"C1-{name}", run=run, part=loss, twins=twins))
        twins = {"shifted-mask": shifted_mask(loss), "sign": lambda i, loss=loss: with_loss(loss(i), -loss(i).loss)}
        if name != "policy-gradient":
            twins |= {"older-policy": at_an_older_policy(loss)}
        if name == "ppo-clip":  # the others hold their ratio fixed themselves
            twins |= {"missing-detach": missing_detach(loss)}
        at_old = partial(is_reinforce_at_the_old_policy, mode=mode)
        checks.append(Check(id=f"C2-{name}", run=at_old, part=loss, twins=twins))
    return checks


CHECKS = (
    *policy_loss_checks(),
    Check(
        id="C1-value",
        run=value_loss_has_its_slope,
        part=value_loss,
        twins={"gradient-of-the-unclipped": half_detached_value_loss},
    ),
    Check(
        id="C1-kl",
        run=estimators_have_their_slope,
        part=(k1, k2, k3),
        twins={"detached": (k1, k2, lambda p, q: k3(p.detach(), q) + 0 * p)},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
