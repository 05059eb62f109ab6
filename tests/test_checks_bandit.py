"""One token, exact: where each way of staying near a reference lands, how the adaptive penalty settles, best of n.

The expectation over tokens is a sum with the policy's own probabilities, so there is no noise: an algorithm lands on
the closed form or it is wrong.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.advantages import token_rewards
from learner.dpo import dpo_loss
from learner.kl import AdaptiveKL, k1, k2, k3
from learner.losses import LossInputs, ppo_clip
from tests.checks import Case, Check, with_twins
from tests.token_mdp import bandit, frontier_at_kl, soft_optimum

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SCORES = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
BETAS = (0.5, 1.0, 2.0)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def optimum(beta: float) -> torch.Tensor:
    solution = soft_optimum(bandit(SCORES.numpy()), REFERENCE.numpy()[None], beta)
    return torch.from_numpy(solution.policy[0])


def inputs(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor) -> LossInputs:
    """Each token a response of its own."""
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        lengths=(1,) * len(advantages),
        loss_mask=torch.ones(len(advantages), dtype=torch.bool),
    )


def descend(loss: Loss, *, num_steps: int, num_epochs: int, learning_rate: float) -> torch.Tensor:
    """Return the policy that steps of some epochs lead to; `loss(logprobs, old_logprobs)` is the expected loss."""
    logits = REFERENCE.log().clone().requires_grad_()
    for _ in range(num_steps):
        old_logprobs = logits.detach().log_softmax(-1)
        for _ in range(num_epochs):
            (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1), old_logprobs), logits)
            with torch.no_grad():
                logits -= learning_rate * gradient
    return logits.detach().softmax(-1)


def reward_penalty_lands_on_the_optimum(parts: SimpleNamespace) -> None:
    """PPO with the KL in the reward, several epochs on each step's samples."""
    for beta in BETAS:

        def loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, beta: float = beta) -> torch.Tensor:
            rows = zip(SCORES.tolist(), old_logprobs.split(1), REFERENCE.log().split(1), strict=True)
            rewards = torch.cat([parts.token_rewards(score, *of_token, beta) for score, *of_token in rows])
            advantages = rewards - old_logprobs.exp() @ rewards
            return old_logprobs.exp() @ parts.ppo_clip(inputs(logprobs, old_logprobs, advantages), clip_range=0.2).loss

        landed = descend(loss, num_steps=160, num_epochs=2, learning_rate=1 / beta)
        torch.testing.assert_close(landed, optimum(beta), atol=5e-5, rtol=0)


def loss_penalty_policy(estimator: Loss, beta: float) -> torch.Tensor:
    """Return where the score's policy gradient plus beta times the estimator, as a loss, lands."""

    def loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
        policy = ppo_clip(inputs(logprobs, old_logprobs, SCORES - old_logprobs.exp() @ SCORES), clip_range=0.2).loss
        return old_logprobs.exp() @ (policy + beta * estimator(logprobs, REFERENCE.log()))

    return descend(loss, num_steps=200, num_epochs=1, learning_rate=2 / beta)


def loss_penalty_lands_on_the_optimum(estimator: Loss) -> None:
    for beta in BETAS:
        torch.testing.assert_close(loss_penalty_policy(estimator, beta), optimum(beta), atol=5e-5, rtol=0)


def loss_penalty_lands_on_the_reverse_optimum(estimator: Loss) -> None:
    """As a loss k3 minimises KL(reference || policy): p_a = beta q_a / (c - r_a), with c > max r such that they add up.

    From p_a (r_a - E r) = beta (p_a - q_a), the gradient of E r - beta KL(q || p) set to 0.
    """
    for beta in BETAS:
        low, high = SCORES.max().item(), SCORES.max().item() + beta
        for _ in range(100):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if (beta * REFERENCE / (middle - SCORES)).sum() > 1 else (low, middle)
        expected = beta * REFERENCE / (high - SCORES)
        assert (expected - optimum(beta)).abs().max() > 0.02, "somewhere else than the optimum"
        torch.testing.assert_close(loss_penalty_policy(estimator, beta), expected, atol=5e-5, rtol=0)


def dpo_policy(implementation: Callable[..., torch.Tensor], reference: torch.Tensor, scores: torch.Tensor, **settings):
    """Return the minimiser of DPO's loss over endless pairs, each labelled by Bradley-Terry with the true scores."""
    first, second = torch.triu_indices(len(scores), len(scores), offset=1)
    is_first = torch.sigmoid(scores[first] - scores[second])
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logprobs, ref = logits.log_softmax(-1), reference.log()
        wins = implementation(logprobs[first], logprobs[second], ref[first], ref[second], **settings)
        losses = implementation(logprobs[second], logprobs[first], ref[second], ref[first], **settings)
        loss = (is_first * wins + (1 - is_first) * losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def dpo_lands_on_the_optimum(implementation: Callable[..., torch.Tensor]) -> None:
    for beta in BETAS:
        landed = dpo_policy(implementation, REFERENCE, SCORES, beta=beta, label_smoothing=0.0)
        torch.testing.assert_close(landed, optimum(beta), atol=5e-5, rtol=0)


def smoothed_dpo_lands_on_the_smoothed_odds(implementation: Callable[..., torch.Tensor]) -> None:
    """Two tokens: beta times the log-odds over the reference's is logit(P'), P' the doubted label, nearer to 1/2."""
    reference, scores = torch.tensor([0.7, 0.3], dtype=torch.float64), torch.tensor([0.0, 1.5], dtype=torch.float64)
    for beta, smoothing in ((0.5, 0.1), (1.0, 0.3)):
        wins = torch.sigmoid(scores[1] - scores[0])
        doubted = (1 - smoothing) * wins + smoothing * (1 - wins)
        odds = torch.logit(doubted) / beta + (reference[1] / reference[0]).log()
        landed = dpo_policy(implementation, reference, scores, beta=beta, label_smoothing=smoothing)
        torch.testing.assert_close(landed[1], torch.sigmoid(odds), atol=5e-5, rtol=0)


def soft_best_of(num_samples: int, beta: float, *, tilt: Callable[[torch.Tensor], torch.Tensor] = torch.exp):
    """Return the exact policy of drawing n tokens from the reference and keeping one with odds exp(score / beta)."""
    ways = [(i, j, num_samples - i - j) for i in range(num_samples + 1) for j in range(num_samples + 1 - i)]
    counts, weights = torch.tensor(ways, dtype=torch.float64), tilt(SCORES / beta)
    log_ways = math.lgamma(num_samples + 1) - torch.lgamma(counts + 1).sum(dim=1)
    probabilities = (log_ways + counts @ REFERENCE.log()).exp()
    return probabilities @ (counts * weights / (counts @ weights)[:, None])


def soft_best_of_n_tends_to_the_optimum(select: Callable[..., torch.Tensor]) -> None:
    """With error c / n (Verdun et al. 2025, 2505.03156): twice the draws, half of it."""
    for beta in BETAS:
        errors = [(select(num, beta) - optimum(beta)).abs().max().item() for num in (32, 64)]
        assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.06)
        torch.testing.assert_close(2 * select(64, beta) - select(32, beta), optimum(beta), atol=3e-3, rtol=0)
    assert soft_best_of(1, 1.0).tolist() == pytest.approx(REFERENCE.tolist())
    hardest = soft_best_of(12, 0.01)  # keeps the best: F(a)^n - F(a - 1)^n
    assert hardest.tolist() == pytest.approx([0.5**12, 0.8**12 - 0.5**12, 1 - 0.8**12], abs=1e-12)


def golden_sequence(controller: Callable[..., AdaptiveKL]) -> None:
    """Ziegler's controller in the order of OpenAI's code: beta 0.15, target 6, horizon 10,000, 512 sequences a step."""
    adaptive = controller(0.15, target=6.0, horizon=10_000)
    coefs = []
    for kl in (0.0, 3.0, 6.0, 12.0, 12.0):
        adaptive.update(kl, 512)
        coefs.append(adaptive.coef)
    assert coefs == pytest.approx([0.14846400, 0.14694373, 0.14694373, 0.14844843, 0.14996854], abs=5e-9)


def controller_settles_on_the_target(controller: Callable[..., AdaptiveKL]) -> None:
    """PPO with the KL in the reward; the penalty that it ends with is the slope of the frontier at the target."""
    target, adaptive = 0.3, controller(0.15, target=0.3, horizon=2_000)
    logits, kls = REFERENCE.log().clone().requires_grad_(), []
    for _ in range(220):
        logprobs = logits.log_softmax(-1)
        rows = zip(SCORES.tolist(), logprobs.detach().split(1), REFERENCE.log().split(1), strict=True)
        rewards = torch.cat([token_rewards(score, *of_token, adaptive.coef) for score, *of_token in rows])
        probabilities = logprobs.detach().exp()
        loss = ppo_clip(inputs(logprobs, logprobs.detach(), rewards - probabilities @ rewards), clip_range=0.2).loss
        (gradient,) = torch.autograd.grad(probabilities @ loss, logits)
        with torch.no_grad():
            logits -= 2.0 * gradient
        kls.append((probabilities @ k1(logprobs.detach(), REFERENCE.log())).item())
        adaptive.update(kls[-1], 512)
    assert max(kls) > 1.2 * target, "it starts too weak, so that there is something to settle"
    assert all(abs(kl / target - 1) < 0.2 for kl in kls[-55:])
    slope = frontier_at_kl(bandit(SCORES.numpy()), REFERENCE.numpy()[None], target).beta
    assert adaptive.coef == pytest.approx(slope, rel=0.02)


class PullsTheWrongWay(AdaptiveKL):
    def update(self, mean_kl, num_sequences):
        super().update(self._target**2 / max(mean_kl, 1e-9), num_sequences)


class ErrorWithoutBound(AdaptiveKL):
    def update(self, mean_kl, num_sequences):
        self._coef *= 1.0 + (mean_kl / self._target - 1.0) * num_sequences / self._horizon


class ForgetsTheBatch(AdaptiveKL):
    def update(self, mean_kl, num_sequences):
        super().update(mean_kl, 1)


def best_of_n_costs_the_published_kl(parts: SimpleNamespace) -> None:
    """KL(best of n || reference) = log n - (n - 1) / n where no two scores tie; measured on samples, by k1.

    A reference of many unequal tokens, the score growing with the token: best of n is F(a)^n - F(a - 1)^n.

    Source:
        Stiennon et al. 2020 (2009.01325), appendix G.3; Beirami et al. 2024 (2401.01879) for the bound with ties.
    """
    generator = np.random.default_rng(0)
    reference = generator.gamma(2.0, size=20_000)
    reference /= reference.sum()
    cumulative = reference.cumsum()
    cumulative[-1] = 1.0
    for num in (2, 3, 4, 8, 16):
        formula = math.log(num) - (num - 1) / num
        best = np.diff(cumulative**num, prepend=0.0)
        exact = best @ np.log(best / reference)
        assert exact < formula
        assert exact == pytest.approx(formula, abs=1e-3)
        draws = cumulative.searchsorted(generator.random((20_000, num)))
        kept = torch.from_numpy(parts.keep(draws))
        logprobs, ref_logprobs = (torch.from_numpy(np.log(of))[kept] for of in (best, reference))
        nats = parts.estimator(logprobs, ref_logprobs)
        standard_error = nats.std().item() / math.sqrt(len(nats))
        assert abs(nats.mean().item() - formula) < 4 * standard_error + 1e-3


def ppo_parts(**planted: Callable) -> SimpleNamespace:
    return SimpleNamespace(**{"token_rewards": token_rewards, "ppo_clip": ppo_clip, **planted})


def best_of_n_parts(**planted: Callable) -> SimpleNamespace:
    return SimpleNamespace(**{"keep": lambda draws: draws.max(axis=1), "estimator": k1, **planted})


CHECKS = (
    Check(
        id="C5-kl-in-reward",
        run=reward_penalty_lands_on_the_optimum,
        part=ppo_parts(),
        twins={
            "kl-sign": ppo_parts(token_rewards=lambda score, lp, ref, beta: token_rewards(score, ref, lp, beta)),
            "kl-in-twos": ppo_parts(token_rewards=lambda score, lp, ref, beta: token_rewards(score, lp, ref, 2 * beta)),
            "k2-in-reward": ppo_parts(token_rewards=lambda score, lp, ref, beta: score - beta * k2(lp, ref)),
            "k3-in-reward": ppo_parts(token_rewards=lambda score, lp, ref, beta: score - beta * k3(lp, ref)),
            "penalty-lost": ppo_parts(token_rewards=lambda score, lp, ref, beta: token_rewards(score, lp, ref, 0.0)),
        },
    ),
    Check(
        id="C5-k2-in-loss",
        run=loss_penalty_lands_on_the_optimum,
        part=k2,
        twins={"k1": k1, "k3": k3, "half-missing": lambda lp, ref: 2 * k2(lp, ref)},
    ),
    Check(
        id="C5-k3-in-loss-lands-elsewhere",
        run=loss_penalty_lands_on_the_reverse_optimum,
        part=k3,
        twins={"k2": k2, "arguments-swapped": lambda lp, ref: k3(ref, lp)},
    ),
    Check(
        id="C5-dpo",
        run=dpo_lands_on_the_optimum,
        part=dpo_loss,
        twins={
            "without-reference": lambda a, b, ref_a, ref_b, **s: dpo_loss(a, b, 0 * ref_a, 0 * ref_b, **s),
            "beta-forgotten": lambda *a, beta, **s: dpo_loss(*a, beta=1.0, **s),
            "labels-doubted": lambda *a, beta, **s: dpo_loss(*a, beta=beta, label_smoothing=0.1),
            "chosen-only": lambda a, _, ref_a, ref_b, **s: dpo_loss(a, ref_b, ref_a, ref_b, **s),
        },
    ),
    Check(
        id="C5-cdpo",
        run=smoothed_dpo_lands_on_the_smoothed_odds,
        part=dpo_loss,
        twins={
            "labels-trusted": lambda *a, beta, label_smoothing: dpo_loss(*a, beta=beta, label_smoothing=0.0),
            "doubted-twice": lambda *a, beta, label_smoothing: dpo_loss(
                *a, beta=beta, label_smoothing=2 * label_smoothing * (1 - label_smoothing)
            ),
        },
    ),
    Check(
        id="C5-best-of-n-limit",
        run=soft_best_of_n_tends_to_the_optimum,
        part=soft_best_of,
        twins={
            "half-the-temperature": lambda num, beta: soft_best_of(num, beta / 2),
            "one-draw-less-tilted": lambda num, beta: soft_best_of(num, beta, tilt=lambda score: 1 + score),
        },
    ),
    Check(
        id="C13-golden-sequence",
        run=golden_sequence,
        part=AdaptiveKL,
        twins={
            "wrong-way": PullsTheWrongWay,
            "error-without-bound": ErrorWithoutBound,
            "batch-forgotten": ForgetsTheBatch,
        },
    ),
    Check(
        id="C13-settles",
        run=controller_settles_on_the_target,
        part=AdaptiveKL,
        twins={"wrong-way": PullsTheWrongWay, "batch-forgotten": ForgetsTheBatch},
    ),
    Check(
        id="C15-best-of-n-kl",
        run=best_of_n_costs_the_published_kl,
        part=best_of_n_parts(),
        twins={
            "k2": best_of_n_parts(estimator=k2),
            "arguments-swapped": best_of_n_parts(estimator=lambda lp, ref: k1(ref, lp)),
            "best-of-one-less": best_of_n_parts(keep=lambda draws: draws[:, 1:].max(axis=1)),
            "median-kept": best_of_n_parts(keep=lambda draws: np.sort(draws, axis=1)[:, draws.shape[1] // 2 - 1]),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
