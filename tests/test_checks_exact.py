"""Critics against linear solves, over all sequences of a small world: no sampling, no tolerance for noise.

C6: a tabular critic trained on GAE's or n-step returns reaches V^pi.  C7: V-trace's fixed point and its limits.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from learner.advantages import VTrace, gae, n_step_advantages, vtrace
from learner.losses import value_loss
from tests.checks import Case, Check, with_twins
from tests.token_mdp import (
    policy_values,
    sequences,
    softmax,
    token_values,
    tree,
)

GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(3, 3, 3))
GAMMA = 0.9
WORLD = tree(lambda _, tokens: float(SCORES[tokens]), num_tokens=3, max_length=3)
WORLD = replace(WORLD, rewards=WORLD.rewards + 0.3, gamma=GAMMA)
LOGITS, BEHAVIOUR_LOGITS = GENERATOR.normal(size=(2, WORLD.num_states, 3))
POLICY, BEHAVIOUR = softmax(LOGITS), softmax(BEHAVIOUR_LOGITS)


def table(policy: np.ndarray) -> SimpleNamespace:
    """Return every sequence of three tokens as tensors [N, 3], with its probability [N] under `policy`."""
    found = list(sequences(WORLD, policy))
    return SimpleNamespace(
        states=torch.tensor([one.states for one in found]),
        tokens=torch.tensor([one.tokens for one in found]),
        rewards=torch.tensor([one.rewards for one in found], dtype=torch.float64),
        discounts=torch.full((len(found), 3), GAMMA, dtype=torch.float64),
        probabilities=torch.tensor([one.probability for one in found], dtype=torch.float64),
        scores=torch.tensor([one.score for one in found], dtype=torch.float64),
    )


def with_end(values: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return [N, 4]: values of the states, and the 0 that follows the last token."""
    return torch.cat([values[states], values.new_zeros(len(states), 1)], dim=1)


def mean_of_state(of_tokens: torch.Tensor, rows: SimpleNamespace) -> torch.Tensor:
    """Return [S]: the mean of [N, 3] over the sequences that pass through a state."""
    weights = rows.probabilities[:, None].expand(-1, 3)
    total, weight = (torch.zeros(WORLD.num_states, dtype=torch.float64) for _ in range(2))
    total.index_add_(0, rows.states.reshape(-1), (of_tokens * weights).reshape(-1))
    weight.index_add_(0, rows.states.reshape(-1), weights.reshape(-1))
    return total / weight


def critic_reaches_the_linear_solve(parts: SimpleNamespace) -> None:
    """Rounds of PPO's critic: returns from the values as they are, then the minimum of the loss in each state."""
    rows, expected = table(POLICY), torch.from_numpy(policy_values(WORLD, POLICY))
    for setting in parts.settings:
        values = torch.from_numpy(np.random.default_rng(1).normal(size=WORLD.num_states))
        for _ in range(3):  # as many as there are tokens: what is known moves one state up in each round
            padded = with_end(values, rows.states)
            returns = parts.advantages(rows.rewards, padded, rows.discounts, setting) + padded[:, :-1]
            leaf = values.clone().requires_grad_()
            loss = parts.value_loss(leaf[rows.states], padded[:, :-1], returns, clip_range=None)
            weight = rows.probabilities[:, None].expand(-1, 3)
            (gradient,) = torch.autograd.grad((weight * loss).sum(), leaf)
            visits = torch.zeros_like(values).index_add_(0, rows.states.reshape(-1), weight.reshape(-1))
            values = values - gradient / visits  # the exact minimum of half a squared error
        torch.testing.assert_close(values, expected, atol=1e-12, rtol=0)


def rho_policy(rho_clip: float) -> np.ndarray:
    """Return the policy proportional to min(rho_clip mu, pi)."""
    clipped = np.minimum(rho_clip * BEHAVIOUR, POLICY)
    return clipped / clipped.sum(axis=1, keepdims=True)


def vtrace_settles_at_the_clipped_policy(implementation: Callable[..., VTrace]) -> None:
    """Whatever lambda and c are, they decide how fast, not where."""
    rows = table(BEHAVIOUR)
    log_ratios = torch.from_numpy(np.log(POLICY / BEHAVIOUR))[rows.states, rows.tokens]
    for rho_clip, c_clip, gae_lambda in ((1.0, 1.0, 1.0), (1.5, 1.0, 0.9), (0.5, 0.3, 1.0), (math.inf, 1.0, 0.5)):
        values = torch.zeros(WORLD.num_states, dtype=torch.float64)
        for _ in range(250):
            padded = with_end(values, rows.states)
            result = implementation(
                rows.rewards,
                padded,
                rows.discounts,
                log_ratios,
                gae_lambda=gae_lambda,
                rho_clip=rho_clip,
                c_clip=c_clip,
            )
            values = values + mean_of_state(result.errors, rows)
        expected = policy_values(WORLD, POLICY if math.isinf(rho_clip) else rho_policy(rho_clip))
        torch.testing.assert_close(values, torch.from_numpy(expected), atol=1e-10, rtol=0)


def vtrace_without_clips_is_importance_sampling(implementation: Callable[..., VTrace]) -> None:
    """lambda 1: target = sum_t gamma^t (product of ratios up to t) r_t for V = 0; its mean is V^pi from any V.

    The first form is per-decision importance sampling (Precup et al. 2000), sequence by sequence.
    """
    rows, settings = table(BEHAVIOUR), {"gae_lambda": 1.0, "rho_clip": math.inf, "c_clip": math.inf}
    log_ratios = torch.from_numpy(np.log(POLICY / BEHAVIOUR))[rows.states, rows.tokens]
    nothing = torch.zeros(len(rows.states), 4, dtype=torch.float64)
    targets = implementation(rows.rewards, nothing, rows.discounts, log_ratios, **settings).errors
    for t in range(3):
        products = log_ratios[:, t:].cumsum(dim=1).exp()
        powers = GAMMA ** torch.arange(3 - t, dtype=torch.float64)
        torch.testing.assert_close(targets[:, t], (products * powers * rows.rewards[:, t:]).sum(dim=1))
    values = torch.from_numpy(np.random.default_rng(2).normal(size=WORLD.num_states))
    errors = implementation(rows.rewards, with_end(values, rows.states), rows.discounts, log_ratios, **settings).errors
    torch.testing.assert_close(values + mean_of_state(errors, rows), torch.from_numpy(policy_values(WORLD, POLICY)))


def vtrace_advantages_are_the_policy_gradient(implementation: Callable[..., VTrace]) -> None:
    """Unclipped and from V^pi, the mean over the samples of (s, a) is ratio (Q^pi - V^pi)."""
    rows, values = table(BEHAVIOUR), policy_values(WORLD, POLICY)
    ratios = POLICY / BEHAVIOUR
    padded = with_end(torch.from_numpy(values), rows.states)
    log_ratios = torch.from_numpy(np.log(ratios))[rows.states, rows.tokens]
    settings = {"gae_lambda": 1.0, "rho_clip": math.inf, "c_clip": math.inf}
    advantages = implementation(rows.rewards, padded, rows.discounts, log_ratios, **settings).advantages
    expected = ratios * (token_values(WORLD, values) - values[:, None])
    for token in range(3):
        is_token = (rows.tokens == token).double()
        actual = mean_of_state(advantages * is_token, rows) / mean_of_state(is_token, rows)
        torch.testing.assert_close(actual, torch.from_numpy(expected[:, token]))


def vtrace_on_policy_is_gae(implementation: Callable[..., VTrace]) -> None:
    rows = table(POLICY)
    padded = with_end(torch.from_numpy(np.random.default_rng(3).normal(size=WORLD.num_states)), rows.states)
    same = torch.zeros_like(rows.rewards)
    for gae_lambda in (0.0, 0.7, 1.0):
        actual = implementation(rows.rewards, padded, rows.discounts, same, gae_lambda=gae_lambda)
        expected = gae(rows.rewards, padded, rows.discounts, gae_lambda)
        torch.testing.assert_close(actual.errors, expected)
    torch.testing.assert_close(actual.advantages, expected)  # lambda 1


def critic(**planted) -> SimpleNamespace:
    shipped = {"advantages": gae, "value_loss": value_loss, "settings": (0.0, 0.5, 0.95, 1.0)}
    return SimpleNamespace(**{**shipped, **planted})


def vtrace_twin(
    *, ratios: Callable[[torch.Tensor], torch.Tensor] = lambda x: x, **forced: float
) -> Callable[..., VTrace]:
    def twin(rewards, values, discounts, log_ratios, **settings):
        return vtrace(rewards, values, discounts, ratios(log_ratios), **{**settings, **forced})

    return twin


def advantages_from_values(rewards, values, discounts, log_ratios, **settings):
    right = vtrace(rewards, values, discounts, log_ratios, **settings)
    deltas = log_ratios.exp() * (rewards + discounts * values[..., 1:] - values[..., :-1])
    return VTrace(errors=right.errors, advantages=deltas / log_ratios.exp())


def one_token_late(rewards, values, discounts, log_ratios, **settings):
    return vtrace(rewards, values, discounts, log_ratios.roll(1, -1), **settings)


CHECKS = (
    Check(
        id="C6-critic-with-gae",
        run=critic_reaches_the_linear_solve,
        part=critic(),
        twins={
            "values-one-state-late": critic(
                advantages=lambda r, v, d, lam: gae(r, torch.cat([v[:, 1:], v[:, -1:]], 1), d, lam)
            ),
            "no-discount": critic(advantages=lambda r, v, d, lam: gae(r, v, torch.ones_like(d), lam)),
            "end-bootstraps": critic(
                advantages=lambda r, v, d, lam: gae(r, torch.cat([v[:, :-1], v[:, -2:-1]], 1), d, lam)
            ),
            "absolute-error": critic(value_loss=lambda v, old, returns, clip_range: (v - returns).abs()),
            "old-value-as-target": critic(value_loss=lambda v, old, returns, **s: value_loss(v, old, old, **s)),
        },
    ),
    Check(
        id="C6-critic-with-n-steps",
        run=critic_reaches_the_linear_solve,
        part=critic(advantages=n_step_advantages, settings=(1, 2, 3, 5)),
        twins={
            "discount-once": critic(
                advantages=lambda r, v, d, n: n_step_advantages(
                    r, v, torch.cat([d[:, :1], torch.ones_like(d[:, 1:])], 1), n
                ),
                settings=(1, 2, 3),
            )
        },
    ),
    Check(
        id="C7-fixed-point",
        run=vtrace_settles_at_the_clipped_policy,
        part=vtrace,
        twins={
            "no-ratio": vtrace_twin(ratios=torch.zeros_like),
            "ratio-upside-down": vtrace_twin(ratios=torch.neg),
            "rho-not-clipped": vtrace_twin(rho_clip=math.inf),
            "ratio-of-the-token-before": one_token_late,
        },
    ),
    Check(
        id="C7-importance-sampling",
        run=vtrace_without_clips_is_importance_sampling,
        part=vtrace,
        twins={
            "c-clipped": vtrace_twin(c_clip=1.0),
            "rho-clipped": vtrace_twin(rho_clip=1.0),
            "lambda-0.9": vtrace_twin(gae_lambda=0.9),
            "ratio-of-the-token-before": one_token_late,
        },
    ),
    Check(
        id="C7-policy-gradient",
        run=vtrace_advantages_are_the_policy_gradient,
        part=vtrace,
        twins={
            "no-ratio": vtrace_twin(ratios=torch.zeros_like),
            "weight-forgotten": advantages_from_values,
            "rho-clipped": vtrace_twin(rho_clip=1.0),
        },
    ),
    Check(
        id="C7-on-policy",
        run=vtrace_on_policy_is_gae,
        part=vtrace,
        twins={
            "lambda-forgotten": vtrace_twin(gae_lambda=1.0),
            "rho-off": vtrace_twin(rho_clip=0.9),
            "weight-forgotten": advantages_from_values,
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
