"""What every loss must obey: gradients by differences, agreement at ratio 1, any split of a minibatch, DPO's identity."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn import functional as F

from learner.dpo import dpo_loss
from learner.kl import k1, k2, k3
from learner.losses import LossInputs, PolicyLoss, aggregation_weights, cispo, policy_gradient, ppo_clip, value_loss
from tests.checks import Case, Check, with_twins

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


# C1: autograd of every loss is the slope of its value, and exactly 0 where a clip is active.


def slope_is_gradient(objective: Scalar, points: Sequence[torch.Tensor]) -> None:
    for point in points:
        assert_is_gradient(gradient(objective, point), objective, point)


def policy_loss_has_its_slope(loss: PolicyLossFunction, mode: str) -> None:
    """Log-ratios of both signs, within the clips and far beyond them; none of them lies on a kink."""
    for spread in (0.1, 1.5):
        inputs = minibatch(spread)
        point = inputs.logprobs

        def objective(logprobs: torch.Tensor, inputs: LossInputs = inputs) -> torch.Tensor:
            return total(loss, dataclasses.replace(inputs, logprobs=logprobs), mode)

        slope_is_gradient(objective, [point])
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


def with_loss(result: PolicyLoss, loss: torch.Tensor) -> PolicyLoss:
    return dataclasses.replace(result, loss=loss)


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


GRID = torch.tensor([0.05, -0.1, 0.4, 1.5, -0.4, -0.5], dtype=torch.float64)
TARGETS = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0], dtype=torch.float64)


def value_loss_has_its_slope(loss: Callable[..., torch.Tensor]) -> None:
    for clip_range in (0.3, None):

        def objective(values: torch.Tensor, clip_range: float | None = clip_range) -> torch.Tensor:
            return loss(values, torch.zeros_like(values), TARGETS, clip_range=clip_range).sum()

        slope_is_gradient(objective, [GRID])


def half_detached_value_loss(values, old_values, returns, *, clip_range):
    result = value_loss(values, old_values, returns, clip_range=clip_range)
    through = 0.5 * (values - returns).square()
    return result.detach() + through - through.detach() + (0 if clip_range else values - values.detach())


def estimators_have_their_slope(estimators: Sequence[Callable[..., torch.Tensor]]) -> None:
    for estimator in estimators:
        slope_is_gradient(lambda logprobs, kl=estimator: (TARGETS * kl(logprobs, -GRID)).sum(), [GRID])


def dpo_has_its_slope(loss: Callable[..., torch.Tensor]) -> None:
    for label_smoothing in (0.0, 0.1):

        def objective(points: torch.Tensor, smoothing: float = label_smoothing) -> torch.Tensor:
            chosen, rejected = points[:3], points[3:]
            return loss(chosen, rejected, TARGETS[:3], TARGETS[3:], beta=0.7, label_smoothing=smoothing).sum()

        slope_is_gradient(objective, [GRID])


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


# C11: loss and gradient do not depend on how a minibatch is split, ordered or padded.

SPLITS = ([(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3, 0), (), (2,), (1,)], [(3,), (2,), (1,), (0,), ()])
"""Ranks and micro-batches of whole sequences, in different orders, with empty ones."""
PRECISIONS = ((torch.float64, 1e-12), (torch.float32, 1e-6))


def cut(inputs: LossInputs, sequences: Sequence[int], *, padding: int) -> LossInputs:
    """Return some sequences, each with masked tokens of hopeless numbers behind it."""
    starts = [0, *itertools.accumulate(LENGTHS)]
    places = [t for b in sequences for t in (*range(starts[b], starts[b + 1]), *(-1,) * padding)]
    index = torch.tensor(places, dtype=torch.long)
    is_padding = index < 0

    def take(tokens: torch.Tensor, filler: float) -> torch.Tensor:
        return torch.where(is_padding, torch.full((), filler).to(tokens), tokens[index])

    return LossInputs(
        logprobs=take(inputs.logprobs, -20.0),
        old_logprobs=take(inputs.old_logprobs, -1.0),
        advantages=take(inputs.advantages, 1e3),
        lengths=tuple(LENGTHS[b] + padding for b in sequences),
        loss_mask=inputs.loss_mask[index] & ~is_padding,
    )


def split_loss(
    loss: PolicyLossFunction,
    mode: str,
    weigh: Weights,
    split: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    padding: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minibatch's loss and gradient, added up over the parts of a split."""
    inputs = minibatch(0.5, dtype)
    leaf = inputs.logprobs.clone().requires_grad_()
    whole = dataclasses.replace(inputs, logprobs=leaf)
    value = torch.zeros((), dtype=torch.float64)
    for sequences in split:
        part = cut(whole, sequences, padding=padding)
        weights = weigh(
            part.lengths,
            part.loss_mask,
            mode,
            total_tokens=int(inputs.loss_mask.sum()),
            total_sequences=len(LENGTHS),
            norm_tokens=NORM_TOKENS,
        )
        share = (loss(part).loss * weights).sum()
        share.backward()
        value += share.detach().double()
    return value, leaf.grad


def is_the_same_however_it_is_cut(weigh: Weights, losses: Sequence[PolicyLossFunction] = ()) -> None:
    losses = losses or [loss for loss, _ in LOSSES.values()]
    for (dtype, tolerance), mode, loss in itertools.product(PRECISIONS, MODES, losses):
        whole = split_loss(loss, mode, weigh, SPLITS[0], dtype=dtype)
        for split, padding in itertools.product(SPLITS, (0, 2)):
            value, grad = split_loss(loss, mode, weigh, split, dtype=dtype, padding=padding)
            torch.testing.assert_close(value, whole[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(grad, whole[1], rtol=tolerance, atol=tolerance)


def weights_of_the_microbatch(lengths, loss_mask, mode, **totals):
    local = {"total_tokens": max(1, int(loss_mask.sum())), "total_sequences": max(1, len(lengths))}
    return aggregation_weights(lengths, loss_mask, mode, **(totals | local))


def weights_of_padding_too(lengths, loss_mask, mode, **totals):
    return loss_mask * aggregation_weights(lengths, torch.ones_like(loss_mask), mode, **totals)


def weights_by_the_first_token(lengths, loss_mask, mode, **totals):
    """Masked tokens are left out at the wrong place: the mask is one token late."""
    return aggregation_weights(lengths, loss_mask.roll(1), mode, **totals)


def with_every_token(loss: PolicyLossFunction) -> PolicyLossFunction:
    return lambda inputs: loss(dataclasses.replace(inputs, loss_mask=torch.ones_like(inputs.loss_mask)))


# C14: DPO is Bradley-Terry's likelihood of the reward beta log(p / p_ref).

REFERENCE = torch.tensor([0.4, 0.1, -0.3, 0.9], dtype=torch.float64)
POLICY = torch.tensor([-0.2, 0.6, 0.5, 0.1], dtype=torch.float64)
CHOSEN, REJECTED = torch.tensor([0, 3, 1, 2]), torch.tensor([1, 2, 2, 0])
BETA = 0.3


def dpo_of_logits(loss: Callable[..., torch.Tensor], policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    p, q = policy.log_softmax(0), reference.log_softmax(0)
    return loss(p[CHOSEN], p[REJECTED], q[CHOSEN], q[REJECTED], beta=BETA)


def dpo_is_bradley_terry(loss: Callable[..., torch.Tensor]) -> None:
    reward = BETA * (POLICY.log_softmax(0) - REFERENCE.log_softmax(0))
    wrong = torch.sigmoid(reward[REJECTED] - reward[CHOSEN])  # what Bradley-Terry gives to the other outcome
    value = dpo_of_logits(loss, POLICY, REFERENCE)
    torch.testing.assert_close(value, -(1 - wrong).log(), rtol=1e-12, atol=0)
    scores = torch.eye(4, dtype=torch.float64) - POLICY.softmax(0)  # row y: gradient of log p(y)
    expected = -(BETA * wrong)[:, None] * (scores[CHOSEN] - scores[REJECTED])
    actual = gradient(lambda logits: dpo_of_logits(loss, logits, REFERENCE).sum(), POLICY)
    torch.testing.assert_close(actual, expected.sum(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dpo_of_logits(loss, POLICY + 7.0, REFERENCE - 3.0), value, rtol=1e-12, atol=0)
    at_reference = dpo_of_logits(loss, REFERENCE, REFERENCE)
    torch.testing.assert_close(at_reference, torch.full_like(at_reference, 2.0).log())


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
    Check(
        id="C1-dpo",
        run=dpo_has_its_slope,
        part=dpo_loss,
        twins={"rejected-detached": lambda c, r, *rest, **s: dpo_loss(c, r.detach(), *rest, **s)},
    ),
    Check(
        id="C11-aggregation",
        run=is_the_same_however_it_is_cut,
        part=aggregation_weights,
        twins={
            "denominators-of-the-microbatch": weights_of_the_microbatch,
            "padding-counts": weights_of_padding_too,
            "shifted-mask": weights_by_the_first_token,
        },
    ),
    Check(
        id="C11-gspo",
        run=lambda loss: is_the_same_however_it_is_cut(aggregation_weights, [loss]),
        part=LOSSES["gspo"][0],
        twins={"ratio-over-padding": with_every_token(LOSSES["gspo"][0])},
    ),
    Check(
        id="C14-dpo",
        run=dpo_is_bradley_terry,
        part=dpo_loss,
        twins={
            "reference-forgotten": lambda c, r, qc, qr, **s: dpo_loss(c, r, 0 * qc, 0 * qr, **s),
            "reference-sign": lambda c, r, qc, qr, **s: dpo_loss(c, r, qr, qc, **s),
            "beta-forgotten": lambda *pair, beta: dpo_loss(*pair, beta=1.0),
            "sides-swapped": lambda c, r, qc, qr, **s: dpo_loss(r, c, qr, qc, **s),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
