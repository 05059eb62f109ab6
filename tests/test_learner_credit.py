"""Dense credit: nothing is gained or lost by spreading the score, and the best policy stays the best one (C9)."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.advantages import gae, with_bootstrap
from learner.credit import attention_rewards, dense_rewards, potential_rewards
from reward.credit_config import CreditConfig
from tests.checks import Case, Check, with_twins
from tests.token_mdp import World, optimal_values, sequences, token_values, tree

Rewards = Callable[..., torch.Tensor]
GAMMA = 0.9
NUM_PHIS = 20


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def shaped(world: World, phi: np.ndarray, ends: np.ndarray, rewards: Rewards) -> World:
    """Return the world whose tokens are rewarded as every response through them is; Phi is `ends` after the last."""
    found = np.full(world.rewards.shape, np.nan)
    for sequence in sequences(world, np.full(world.rewards.shape, 1 / world.num_tokens)):
        last = ends[sequence.states[-1], sequence.tokens[-1]]
        potentials = numbers(*phi[list(sequence.states[1:])], last)
        row = rewards(sequence.score, potentials, coef=0.7, gamma=world.gamma, is_terminal=True)
        for state, token, value in zip(sequence.states, sequence.tokens, row.tolist(), strict=True):
            assert np.isnan(found[state, token]) or found[state, token] == value, "a token's reward is one number"
            found[state, token] = value
    return replace(world, rewards=found)


def random_shapings(rewards: Rewards) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield Q* [S, V] of a random world without and with shaping by random potentials [S], and these."""
    generator = np.random.default_rng(0)
    scores: dict[tuple[int, tuple[int, ...]], float] = {}
    plain = tree(
        lambda prompt, tokens: scores.setdefault((prompt, tokens), generator.normal()),
        num_tokens=3, max_length=3, eos=0, num_prompts=2,
    )  # fmt: skip
    world = replace(plain, gamma=GAMMA)
    for _ in range(NUM_PHIS):
        phi = generator.normal(scale=3, size=world.num_states)
        phi[:2] = 0  # prompts
        other = shaped(world, phi, generator.normal(scale=3, size=world.rewards.shape), rewards)
        yield token_values(world, optimal_values(world)), token_values(other, optimal_values(other)), phi


def keeps_the_greedy_policy(rewards: Rewards) -> None:
    for plain, found, _ in random_shapings(rewards):
        assert (found.argmax(axis=1) == plain.argmax(axis=1)).all(), "the best token of every state stays the best"


def lowers_the_values_by_phi(rewards: Rewards) -> None:
    for plain, found, phi in random_shapings(rewards):
        assert found == pytest.approx(plain - 0.7 * phi[:, None]), "Q' = Q - coef Phi"


def keeps_the_advantages(rewards: Rewards) -> None:
    """With V' = V - coef Phi, GAE is the same for any lambda, whether the response ended or was cut off."""
    generator = torch.Generator().manual_seed(0)
    for is_terminal in (True, False):
        values, phi = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        phi[0] = 0.0
        row = rewards(2.5, phi[1:], coef=0.7, gamma=GAMMA, is_terminal=is_terminal)
        plain, discounts = torch.zeros_like(row), torch.full_like(row, GAMMA)
        plain[-1] = 2.5
        for gae_lambda in (0.0, 0.5, 1.0):
            wanted = gae(plain, with_bootstrap(values, is_terminal=is_terminal), discounts, gae_lambda)
            less = with_bootstrap(values - 0.7 * phi, is_terminal=is_terminal)
            assert torch.allclose(gae(row, less, discounts, gae_lambda), wanted, atol=1e-12)


def sums_to_the_score(rewards: Rewards) -> None:
    generator = torch.Generator().manual_seed(0)
    for mix in (0.0, 0.3, 1.0):
        for length in (1, 2, 7):
            shares = torch.rand(length, generator=generator, dtype=torch.float64).square()
            shares /= shares.sum()
            row = rewards(-3.5, shares, mix)
            assert float(row.sum()) == pytest.approx(-3.5, abs=1e-12)
            spread = row.clone()
            spread[-1] -= -3.5 * (1 - mix)
            assert torch.allclose(spread, -3.5 * mix * shares, atol=1e-12), "what is spread is in proportion"


def kept_at_the_end(score, potentials, *, coef, gamma, is_terminal):
    return potential_rewards(score, potentials, coef=coef, gamma=gamma, is_terminal=False)


def always_ended(score, potentials, *, coef, gamma, is_terminal):
    return potential_rewards(score, potentials, coef=coef, gamma=gamma, is_terminal=True)


def without_gamma(score, potentials, *, coef, gamma, is_terminal):
    return potential_rewards(score, potentials, coef=coef, gamma=1.0, is_terminal=is_terminal)


def bonus(score, potentials, *, coef, gamma, is_terminal):
    """No difference of potentials: each state pays its Phi."""
    row = coef * potentials
    row[-1] = score
    return row


def one_late(score, potentials, *, coef, gamma, is_terminal):
    shifted = torch.cat([potentials[:1] * 0, potentials[:-1]])
    return potential_rewards(score, shifted, coef=coef, gamma=gamma, is_terminal=is_terminal)


def score_twice(score, shares, mix):
    rewards = attention_rewards(score, shares, mix)
    rewards[-1] += score * mix
    return rewards


CHECKS = (
    Check(
        id="C9-greedy-policy",
        run=keeps_the_greedy_policy,
        part=potential_rewards,
        twins={"phi-after-the-end": kept_at_the_end, "phi-undiscounted": without_gamma, "no-potential": bonus},
    ),
    Check(
        id="C9-values",
        run=lowers_the_values_by_phi,
        part=potential_rewards,
        twins={"phi-after-the-end": kept_at_the_end, "phi-of-the-state-before": one_late, "no-potential": bonus},
    ),
    Check(
        id="C9-advantages",
        run=keeps_the_advantages,
        part=potential_rewards,
        twins={"cut-off-taken-for-ended": always_ended, "phi-of-the-state-before": one_late, "no-potential": bonus},
    ),
    Check(
        id="C9-attention-sum",
        run=sums_to_the_score,
        part=attention_rewards,
        twins={
            "all-on-the-last-too": score_twice,
            "rest-forgotten": lambda score, shares, mix: score * mix * shares,
            "mix-ignored": lambda score, shares, mix: score * shares,
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_only_a_bonus_makes_the_worse_token_the_better_one() -> None:
    """By hand: one token ends with score 1; another leads to a state of Phi 2, where the next one ends with score 0."""
    settings = {"coef": 1.0, "gamma": 1.0, "is_terminal": True}
    assert potential_rewards(1.0, numbers(0.0), **settings).tolist() == [1.0]
    assert potential_rewards(0.0, numbers(2.0, 0.0), **settings).tolist() == [2.0, -2.0], "0 < 1 in all"
    assert bonus(0.0, numbers(2.0, 0.0), **settings).tolist() == [2.0, 0.0], "2 > 1 in all"


def test_the_worked_examples() -> None:
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert attention_rewards(6.0, shares, 1.0).tolist() == [3.0, 1.5, 1.5]
    assert attention_rewards(6.0, shares, 0.5).tolist() == [1.5, 0.75, 3.75]
    assert attention_rewards(0.1, shares, 0.0).tolist() == torch.tensor([0.0, 0.0, 0.1]).tolist()
    phi = torch.tensor([1.0, 3.0, 2.0])
    assert potential_rewards(6.0, phi, coef=1.0, gamma=1.0, is_terminal=True).tolist() == [1.0, 2.0, 3.0]
    assert potential_rewards(6.0, phi, coef=1.0, gamma=1.0, is_terminal=False).tolist() == [1.0, 2.0, 5.0]
    assert potential_rewards(6.0, phi, coef=2.0, gamma=0.5, is_terminal=True).tolist() == [1.0, 1.0, 0.0]


def test_differences_of_the_judge_s_own_scores_are_potentials() -> None:
    """RED: r_t = RM(y_<=t) - RM(y_<t), with RM(prompt) 0."""
    scores = numbers(0.4, -1.2, 0.9, 0.3)
    found = potential_rewards(0.3, scores, coef=1.0, gamma=1.0, is_terminal=True)
    assert torch.allclose(found, torch.diff(scores, prepend=numbers(0.0)))


@pytest.mark.parametrize(
    ("kind", "token_scores", "expected"),
    [
        ("attention", [0.5, 0.5, 0.0], [1.0, 1.0, 2.0]),
        ("potential", [0.5, 0.5, 8.0], [0.125, -0.125, 3.75]),  # .5 (.25 - 0), .5 (.25 - .5), .5 (0 - .5) + 4
    ],
)
def test_a_kind_means_its_formula(kind: str, token_scores: list[float], expected: list[float]) -> None:
    credit = CreditConfig(component="judge", kind=kind, coef=0.5)
    found = dense_rewards(4.0, token_scores, credit, gamma=0.5, is_terminal=True)
    assert (found.tolist(), found.dtype) == (expected, torch.float32)


@pytest.mark.parametrize(
    ("kind", "values", "pattern"),
    [
        ("attention", [], "one number for each token, got shape"),
        ("attention", [0.9, 0.9], "at least 0 and sum to 1"),
        ("attention", [1.5, -0.5], "at least 0 and sum to 1"),
        ("potential", [1.0, float("nan")], "must be finite, got"),
        ("potential", [], "one number for each token, got shape"),
    ],
)
def test_token_scores_of_another_kind_are_refused(kind: str, values: list[float], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        dense_rewards(1.0, values, CreditConfig(component="judge", kind=kind), gamma=1.0, is_terminal=True)
