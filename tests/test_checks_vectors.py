"""Numbers that others published, each with implementations that are wrong in one place and must miss them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from learner.advantages import (
    VTrace,
    gae,
    n_step_advantages,
    returns_to_go,
    token_moments,
    vtrace,
    whiten,
)
from learner.config import OptimizerConfig
from learner.kl import AdaptiveKL, k1, k2, k3
from learner.local import LocalEngine
from learner.losses import LossInputs, PolicyLoss, ppo_clip
from tests.checks import Case, Check, with_twins

Function = Callable[..., torch.Tensor]


# rlax `multistep_test.py`, TruncatedGeneralizedAdvantageEstimationTest, with its tolerance.
GAE_REWARDS = torch.tensor([[0.0, 0.0, 1.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0, 1.0]])
GAE_VALUES = torch.tensor([[1.0, 4.0, -3.0, -2.0, -1.0, -1.0], [-3.0, -2.0, -1.0, 0.0, 5.0, -1.0]])
GAE_DISCOUNTS = torch.tensor([[0.99] * 5, [0.9, 0.9, 0.9, 0.0, 0.9]])
GAE_EXPECTED = {
    1.0: [[-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]],
    0.7: [[-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]],
    0.4: [[0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0, -4.9]],
}


def gae_is_published(implementation: Function) -> None:
    for gae_lambda, expected in GAE_EXPECTED.items():
        actual = implementation(GAE_REWARDS, GAE_VALUES, GAE_DISCOUNTS, gae_lambda)
        torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-3, rtol=0)


def gae_value_off_by_one(rewards, values, discounts, gae_lambda):
    return gae(rewards, values.roll(-1, -1), discounts, gae_lambda)


def gae_through_the_end(rewards, values, discounts, gae_lambda):
    return gae(rewards, values, torch.where(discounts == 0, 0.9, discounts), gae_lambda)


# rlax `multistep_test.py`: LambdaReturnsTest, DiscountedReturnsTest and NStepBootstrappedReturnsTest; v_t = V(s_{t+1}).
REWARDS = torch.tensor([[1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1]])
DISCOUNTS = torch.tensor([[0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7]])
NEXT_VALUES = torch.tensor([[3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7]])
VALUES = torch.cat([torch.tensor([[0.25], [-4.0]]), NEXT_VALUES], dim=-1)  # V(s_0) is no part of a return
LAMBDA_RETURNS = [[1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], [0.7866317, 0.9913063, 0.1101501, 2.834, 3.99]]
DISCOUNTED = [[1.315, 0.63000005, 0.70000005, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.9899998]]
THREE_STEP = [[2.8, -3.15, 0.7, 1.7, 3.4], [1.2155, 0.714, 0.2576, 3.192, 3.99]]


def lambda_returns_are_published(implementation: Function) -> None:
    returns = implementation(REWARDS, VALUES, DISCOUNTS, 0.75) + VALUES[:, :-1]
    torch.testing.assert_close(returns, torch.tensor(LAMBDA_RETURNS), rtol=1e-5, atol=1e-6)


def discounted_returns_are_published(implementation: Function) -> None:
    rewards = REWARDS.clone()
    rewards[:, -1] += DISCOUNTS[:, -1] * NEXT_VALUES[:, -1]  # the published ones bootstrap from the last value
    torch.testing.assert_close(implementation(rewards, DISCOUNTS), torch.tensor(DISCOUNTED), rtol=1e-5, atol=1e-6)


def returns_discounted_late(rewards, discounts):
    return returns_to_go(rewards, discounts.roll(1, -1))


def n_step_returns_are_published(implementation: Function) -> None:
    for n, expected in ((3, THREE_STEP), (5, DISCOUNTED), (7, DISCOUNTED)):
        returns = implementation(REWARDS, VALUES, DISCOUNTS, n) + VALUES[:, :-1]
        torch.testing.assert_close(returns, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def n_step_one_too_many(rewards, values, discounts, n):
    return n_step_advantages(rewards, values, discounts, n + 1)


def n_step_from_the_state_left(rewards, values, discounts, n):
    shifted = torch.cat([values[..., :1], values[..., :-1]], dim=-1)
    return n_step_advantages(rewards, shifted, discounts, n) + shifted[..., :-1] - values[..., :-1]


# rlax `vtrace_test.py`, VTraceTest.
BEHAVIOUR_LOGITS = torch.tensor(
    [[[8.9, 0.7], [5.0, 1.0], [0.6, 0.1], [-0.9, -0.1]], [[0.3, -5.0], [1.0, -8.0], [0.3, 1.7], [4.7, 3.3]]]
)
TARGET_LOGITS = torch.tensor(
    [[[0.4, 0.5], [9.2, 8.8], [0.7, 4.4], [7.9, 1.4]], [[1.0, 0.9], [1.0, -1.0], [-4.3, 8.7], [0.8, 0.3]]]
)
ACTIONS = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1]])
VTRACE_REWARDS = torch.tensor([[-1.3, -1.3, 2.3, 42.0], [1.3, 5.3, -3.3, -5.0]])
VTRACE_DISCOUNTS = torch.tensor([[0.0, 0.89, 0.85, 0.99], [0.88, 1.0, 0.83, 0.95]])
VTRACE_VALUES = torch.tensor([[2.1, 1.1, -3.1, 0.0, 8.4], [3.1, 0.1, -1.1, 7.4, -1.2]])
ERRORS = [[-1.6155143, -3.4973226, 1.8670533, 50.316002], [1.4662437, 3.6116405, -8.3327293e-5, -13.54]]
POLICY_ADVANTAGES = [[-1.6155143, -3.4973226, 1.8670534, 50.316002], [1.4662433, 3.6116405, -8.3369283e-5, -13.54]]


def vtrace_is_published(implementation: Callable[..., VTrace]) -> None:
    log_ratios = (TARGET_LOGITS.log_softmax(-1) - BEHAVIOUR_LOGITS.log_softmax(-1)).gather(-1, ACTIONS[..., None])
    result = implementation(
        VTRACE_REWARDS, VTRACE_VALUES, VTRACE_DISCOUNTS, log_ratios[..., 0], gae_lambda=1.0, rho_clip=1.0, c_clip=1.0
    )
    torch.testing.assert_close(result.errors, torch.tensor(ERRORS), rtol=1e-3, atol=0)
    torch.testing.assert_close(result.advantages, torch.tensor(POLICY_ADVANTAGES), rtol=1e-3, atol=0)


def vtrace_ratio_upside_down(rewards, values, discounts, log_ratios, **settings):
    return vtrace(rewards, values, discounts, -log_ratios, **settings)


def vtrace_not_truncated(*args, **settings):
    return vtrace(*args, **(settings | {"rho_clip": math.inf}))


def vtrace_trace_not_truncated(*args, **settings):
    return vtrace(*args, **(settings | {"c_clip": math.inf}))


def vtrace_on_policy(rewards, values, discounts, log_ratios, **settings):
    return vtrace(rewards, values, discounts, torch.zeros_like(log_ratios), **settings)


# rlax `policy_gradients_test.py`, ClippedSurrogatePGLossTest.
CLIP_LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
CLIP_OLD_LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
CLIP_ADVANTAGES = torch.tensor([0.3, 0.2, 0.1])

PolicyLossFunction = Callable[..., PolicyLoss]


def one_token_each(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        lengths=(1,) * len(logprobs),
        loss_mask=torch.ones(len(logprobs), dtype=torch.bool),
    )


def ppo_clip_is_published(implementation: PolicyLossFunction) -> None:
    logprobs, old_logprobs = (z.log_softmax(-1).diagonal() for z in (CLIP_LOGITS, CLIP_OLD_LOGITS))  # actions 0, 1, 2
    for sign, expected in ((1, -0.17117467), (-1, 0.19333333)):
        loss = implementation(one_token_each(logprobs, old_logprobs, sign * CLIP_ADVANTAGES), clip_range=0.2).loss
        assert loss.mean().item() == pytest.approx(expected, abs=1e-5)


def dual_clip_is_published(implementation: PolicyLossFunction) -> None:
    """slime `tests/test_policy_loss.py`: ratios 2, 2, 0.5."""
    inputs = one_token_each(torch.tensor([2.0, 2.0, 0.5]).log(), torch.zeros(3), torch.tensor([2.0, -2.0, 2.0]))
    result = implementation(inputs, clip_range=0.2, dual_clip=1.5)
    torch.testing.assert_close(result.loss, torch.tensor([-2.4, 3.0, -1.0]))
    assert result.is_clipped.tolist() == [True, True, False]


def swapped(inputs: LossInputs) -> LossInputs:
    return one_token_each(inputs.old_logprobs, inputs.logprobs, inputs.advantages)


def with_negated_advantages(inputs: LossInputs) -> LossInputs:
    return one_token_each(inputs.logprobs, inputs.old_logprobs, -inputs.advantages)


def negated(result: PolicyLoss) -> PolicyLoss:
    return PolicyLoss(loss=-result.loss, ratio=result.ratio, is_clipped=result.is_clipped)


def whitening_is_published(implementation: Function) -> None:
    """What lm-human-preferences prints: detail 18 of "The N implementation details of RLHF with PPO"."""
    values = torch.arange(1.2, 2.05, 0.1, dtype=torch.float64).reshape(3, 3)
    expected = [0.05080712, 0.4381051, 0.8254035, 1.2127019, 1.6000004, 1.9872988, 2.3745968, 2.7618952, 3.1491938]
    kept = torch.tensor(expected, dtype=torch.float64).reshape(3, 3)
    torch.testing.assert_close(implementation(values, shift_mean=False), kept, atol=2e-6, rtol=0)
    torch.testing.assert_close(implementation(values, shift_mean=True), kept - 1.6, atol=2e-6, rtol=0)


def whiten_all(values: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    moments = token_moments(values, torch.ones_like(values, dtype=torch.bool))
    return whiten(values, moments.mean, moments.variance, shift_mean=shift_mean)


def whiten_by_the_sample(values: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    return whiten(values, values.mean().item(), values.var(correction=1).item(), shift_mean=shift_mean)


def test_the_sample_variance_gives_the_other_published_numbers() -> None:
    """The same source prints what its authors got by mistake: so the twin above is the bug that people had."""
    values = torch.arange(1.2, 2.05, 0.1, dtype=torch.float64)
    published = torch.tensor([0.1394, 0.5046, 0.8697], dtype=torch.float64)
    torch.testing.assert_close(whiten_by_the_sample(values, shift_mean=False)[:3], published, atol=1e-4, rtol=0)


# Three categories: p = softmax(LOGITS), q = OTHER.  Exact sums; the gradients are with respect to p's logits.
LOGITS = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
OTHER = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
KL_GRADIENT = torch.tensor([-0.140136, 0.004289, 0.135848], dtype=torch.float64)
REVERSE_KL_GRADIENT = torch.tensor([-0.146385, 0.014478, 0.131906], dtype=torch.float64)
Estimators = tuple[Function, Function, Function]


def gradient_of(objective: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(objective(logits.log_softmax(0)), logits)[0]


def as_a_loss(estimator: Function) -> torch.Tensor:
    """The expected gradient: samples are fixed, only the estimator is differentiated."""
    return gradient_of(lambda logprobs: (logprobs.exp().detach() * estimator(logprobs, OTHER)).sum())


def kl_table_holds(estimators: Estimators) -> None:
    one, two, three = estimators
    logprobs = LOGITS.log_softmax(0)
    for estimator, expected in ((one, 0.0498965), (two, 0.0504194), (three, 0.0498965)):
        assert (logprobs.exp() * estimator(logprobs, OTHER)).sum().item() == pytest.approx(expected, abs=1e-7)
    torch.testing.assert_close(as_a_loss(one), torch.zeros_like(LOGITS), atol=1e-12, rtol=0)
    torch.testing.assert_close(as_a_loss(two), KL_GRADIENT, atol=1e-6, rtol=0)
    torch.testing.assert_close(as_a_loss(three), REVERSE_KL_GRADIENT, atol=1e-6, rtol=0)


def test_the_gradients_of_the_table_are_those_of_the_two_divergences() -> None:
    of_kl = gradient_of(lambda p: (p.exp() * (p - OTHER)).sum())
    of_reverse = gradient_of(lambda p: (OTHER.exp() * (OTHER - p)).sum())
    torch.testing.assert_close(of_kl, KL_GRADIENT, atol=1e-6, rtol=0)
    torch.testing.assert_close(of_reverse, REVERSE_KL_GRADIENT, atol=1e-6, rtol=0)


def swap(estimator: Function) -> Function:
    return lambda logprobs, other: estimator(other, logprobs)


def adaptive_controller_is_golden(controller_type: type[AdaptiveKL]) -> None:
    controller = controller_type(0.15, target=6.0, horizon=10_000)
    golden = [(0.0, 0.14846400), (3.0, 0.14694373), (6.0, 0.14694373), (12.0, 0.14844843), (12.0, 0.14996854)]
    for measured, expected in golden:
        controller.update(measured, 512)
        assert controller.coef == pytest.approx(expected, abs=5e-9)


class UpsideDown(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        super().update(2 * self._target - mean_kl, num_sequences)


class PerToken(AdaptiveKL):
    def update(self, mean_kl: float, num_sequences: int) -> None:
        super().update(mean_kl / 24, num_sequences)


# "The N implementation details of RLHF with PPO": first step over learning rate, eps 1e-5, betas (0.9, 0.999).
ADAM_EPS, ADAM_BETAS = 1e-5, (0.9, 0.999)
FIRST_STEPS = {1e-3: 0.990, 1e-4: 0.909, 1e-5: 0.500}
FIRST_STEPS_OF_TENSORFLOW = {1e-3: 0.760, 1e-4: 0.240, 1e-5: 0.0307}


def first_step(config: OptimizerConfig, gradient: float) -> float:
    """Return how far the shipped optimizer moves one weight at learning rate 1."""
    module = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(module.weight)
    engine = LocalEngine(module, config, dtype=torch.float64)
    engine.backward(gradient * module.weight.sum())
    engine.step(1.0)
    return -module.weight.item()


def optimizer_config(eps: float = ADAM_EPS, beta2: float = ADAM_BETAS[1]) -> OptimizerConfig:
    return OptimizerConfig(betas=(ADAM_BETAS[0], beta2), eps=eps, weight_decay=0.0, max_grad_norm=1e9)


def adam_steps_are_published(config: OptimizerConfig, published: dict[float, float] = FIRST_STEPS) -> None:
    for gradient, expected in published.items():
        assert first_step(config, gradient) == pytest.approx(expected, abs=6e-4)


def test_an_epsilon_before_the_bias_correction_is_tensorflows() -> None:
    """Both columns of the published table: TensorFlow's epsilon is PyTorch's times sqrt(1 - beta2^t)."""
    as_tensorflow = optimizer_config(eps=ADAM_EPS / math.sqrt(1 - ADAM_BETAS[1]))
    adam_steps_are_published(as_tensorflow, FIRST_STEPS_OF_TENSORFLOW)


CHECKS = (
    Check(
        id="11a-gae",
        run=gae_is_published,
        part=gae,
        twins={
            "value-off-by-one": gae_value_off_by_one,
            "no-lambda": lambda rewards, values, discounts, _: gae(rewards, values, discounts, 1.0),
            "through-the-end": gae_through_the_end,
            "next-reward": lambda rewards, *rest: gae(rewards.roll(-1, -1), *rest),
        },
    ),
    Check(
        id="11a-lambda-returns",
        run=lambda_returns_are_published,
        part=gae,
        twins={
            "value-off-by-one": gae_value_off_by_one,
            "lambda-of-the-complement": lambda r, v, d, gae_lambda: gae(r, v, d, 1 - gae_lambda),
        },
    ),
    Check(
        id="11a-discounted-returns",
        run=discounted_returns_are_published,
        part=returns_to_go,
        twins={
            "discount-off-by-one": returns_discounted_late,
            "not-discounted": lambda rewards, discounts: returns_to_go(rewards, torch.ones_like(discounts)),
            "forward": lambda rewards, discounts: returns_to_go(rewards.flip(-1), discounts.flip(-1)).flip(-1),
        },
    ),
    Check(
        id="11a-n-step",
        run=n_step_returns_are_published,
        part=n_step_advantages,
        twins={"one-step-too-many": n_step_one_too_many, "value-off-by-one": n_step_from_the_state_left},
    ),
    Check(
        id="11a-vtrace",
        run=vtrace_is_published,
        part=vtrace,
        twins={
            "ratio-upside-down": vtrace_ratio_upside_down,
            "rho-not-truncated": vtrace_not_truncated,
            "c-not-truncated": vtrace_trace_not_truncated,
            "ratio-forgotten": vtrace_on_policy,
        },
    ),
    Check(
        id="11a-ppo-clip",
        run=ppo_clip_is_published,
        part=ppo_clip,
        twins={
            "wrong-side": lambda inputs, **s: negated(ppo_clip(with_negated_advantages(inputs), **s)),
            "ratio-upside-down": lambda inputs, **s: ppo_clip(swapped(inputs), **s),
            "clip-twice-as-wide": lambda inputs, clip_range: ppo_clip(inputs, clip_range=2 * clip_range),
        },
    ),
    Check(
        id="11a-dual-clip",
        run=dual_clip_is_published,
        part=ppo_clip,
        twins={
            "forgotten": lambda inputs, *, clip_range, dual_clip: ppo_clip(inputs, clip_range=clip_range),
            "wrong-side": lambda inputs, **s: negated(ppo_clip(with_negated_advantages(inputs), **s)),
        },
    ),
    Check(
        id="11a-whitening",
        run=whitening_is_published,
        part=whiten_all,
        twins={
            "sample-variance": whiten_by_the_sample,
            "mean-the-other-way": lambda values, *, shift_mean: whiten_all(values, shift_mean=not shift_mean),
        },
    ),
    Check(
        id="11a-kl-table",
        run=kl_table_holds,
        part=(k1, k2, k3),
        twins={
            "k1-sign": (swap(k1), k2, k3),
            "k2-without-half": (k1, lambda p, q: (p - q).square(), k3),
            "k3-sign": (k1, k2, swap(k3)),
            "k3-detached": (k1, k2, lambda p, q: k3(p.detach(), q) + 0 * p),
        },
    ),
    Check(
        id="11a-adaptive-beta",
        run=adaptive_controller_is_golden,
        part=AdaptiveKL,
        twins={"sign": UpsideDown, "kl-per-token": PerToken},
    ),
    Check(
        id="11a-adam-eps",
        run=adam_steps_are_published,
        part=optimizer_config(),
        twins={
            "tensorflow-epsilon": optimizer_config(eps=ADAM_EPS / math.sqrt(1 - ADAM_BETAS[1])),
            "epsilon-not-passed-on": optimizer_config(eps=1e-8),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
