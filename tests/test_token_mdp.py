"""The exact solvers, each against another road to the same number."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.checks import Case, Check, with_twins
from tests.token_mdp import (
    World,
    bandit,
    expected_score,
    frontier_at_kl,
    optimal_values,
    policy_gradient,
    policy_values,
    relative_entropy,
    sequences,
    soft_optimum,
    softmax,
    token_values,
    transitions,
    tree,
)

GENERATOR = np.random.default_rng(0)
WRITING = tree(lambda p, tokens: math.sin(3 * p + sum(tokens) + 2 * tokens[0]), num_tokens=3, max_length=3, eos=0)
LOGITS = GENERATOR.normal(size=(WRITING.num_states, 3))
RING = World(  # "on" and "back" around 4 states for ever, and a way out at state 3
    next_state=np.array([[1, 3], [2, 0], [3, 1], [-1, 2]]),
    rewards=np.array([[0.0, 1.0], [0.5, 0.0], [0.0, -1.0], [2.0, 0.3]]),
    start=np.array([1.0, 0.0, 0.0, 0.0]),
    gamma=0.9,
)
RING_POLICY = softmax(GENERATOR.normal(size=(4, 2)))


def test_a_tree_has_the_states_and_sequences_of_its_lengths() -> None:
    world = tree(lambda *_: 0.0, num_tokens=4, max_length=3)
    assert world.num_states == 1 + 4 + 16
    uniform = np.full((21, 4), 0.25)
    assert [one.probability for one in sequences(world, uniform)] == [1 / 64] * 64
    # With an eos: it alone, then two letters each followed by eos or two letters, the third token being the last.
    assert [one.tokens for one in sequences(tree(lambda *_: 0.0, num_tokens=2, max_length=3, eos=0), uniform)] == [
        (0,),
        (1, 0),
        (1, 1, 0),
        (1, 1, 1),
    ]


def values_are_the_mean_scores(solve) -> None:
    policy = softmax(LOGITS)
    mean = sum(one.probability * one.score for one in sequences(WRITING, policy))
    assert WRITING.start @ solve(WRITING, policy) == pytest.approx(mean, abs=1e-14)
    ring = np.zeros(4)
    for _ in range(600):  # the Bellman equation, iterated
        ring = (RING_POLICY * token_values(RING, ring)).sum(axis=1)
    assert solve(RING, RING_POLICY) == pytest.approx(ring, abs=1e-13)


def without_discount(world, policy):
    return policy_values(replace(world, gamma=1.0), policy)


def one_state_late(world, policy):
    return transitions(world, policy) @ policy_values(world, policy)


def gradient_equals_finite_differences(gradient) -> None:
    expected = np.zeros_like(LOGITS)
    for index in np.ndindex(*LOGITS.shape):
        step = np.zeros_like(LOGITS)
        step[index] = 1e-5
        up, down = (expected_score(WRITING, softmax(LOGITS + sign * step)) for sign in (1, -1))
        expected[index] = (up - down) / 2e-5
    assert gradient(WRITING, LOGITS) == pytest.approx(expected, abs=1e-9)


def without_visits(world, logits):
    policy = softmax(logits)
    values = policy_values(world, policy)
    return policy * (token_values(world, values) - values[:, None])


def optimum_is_the_gibbs_tilt(solve) -> None:
    """Weigh all sequences by exp(score / beta): the optimum over distributions of sequences, steps or not."""
    reference = softmax(LOGITS)
    every = list(sequences(WRITING, reference))
    prior, scores = (np.array([getattr(one, name) for one in every]) for name in ("probability", "score"))
    for beta in (0.2, 1.0, 3.0):
        tilted = prior * np.exp(scores / beta)
        total = tilted.sum()
        tilted /= total
        actual = solve(WRITING, reference, beta)
        assert actual.soft_values[0] == pytest.approx(beta * math.log(total), abs=1e-12)
        assert actual.score == pytest.approx(tilted @ scores, abs=1e-12)
        assert actual.kl == pytest.approx(relative_entropy(tilted, prior), abs=1e-12)
        under = [one.probability for one in sequences(WRITING, actual.policy)]
        assert under == pytest.approx(tilted, abs=1e-12)


def greedy_tilt(world, reference, beta):
    """Planted bug: every state looks at its own tokens' hard values, without the room for error of later ones."""
    values = optimal_values(world)
    policy = reference * np.exp(token_values(world, values) / beta)
    policy /= policy.sum(axis=1, keepdims=True)
    kl = float(world.start @ policy_values(world, policy, relative_entropy(policy, reference)))
    exact = soft_optimum(world, reference, beta)
    return type(exact)(
        beta=beta, policy=policy, soft_values=exact.soft_values, score=expected_score(world, policy), kl=kl
    )


# pi_ref (.5, .3, .2), r (0, 1, 2): beta -> optimal policy, soft value, nats.
PUBLISHED = {
    0.5: ((0.036667, 0.162559, 0.800774), 1.306369, 0.915475),
    1.0: ((0.179, 0.291944, 0.529056), 1.027222, 0.322834),
    2.0: ((0.32504, 0.32154, 0.35342), 0.861320, None),
}


def bandit_numbers_are_the_published_ones(solve) -> None:
    world, reference = bandit(np.array([0.0, 1.0, 2.0])), np.array([[0.5, 0.3, 0.2]])
    for beta, (policy, soft_value, kl) in PUBLISHED.items():
        actual = solve(world, reference, beta)
        assert actual.policy[0] == pytest.approx(policy, abs=1e-6)
        assert actual.soft_values[0] == pytest.approx(soft_value, abs=1e-6)
        assert kl is None or actual.kl == pytest.approx(kl, abs=1e-6)
        assert actual.score - beta * actual.kl == pytest.approx(soft_value, abs=1e-6)


def other_way_round(world, reference, beta):
    return soft_optimum(world, reference, 1 / beta if beta != 1 else 0.9)


CHECKS = (
    Check(
        id="C6-linear-solve",
        run=values_are_the_mean_scores,
        part=policy_values,
        twins={"without-discount": without_discount, "values-of-the-next-state": one_state_late},
    ),
    Check(
        id="C3-policy-gradient-theorem",
        run=gradient_equals_finite_differences,
        part=policy_gradient,
        twins={"without-visits": without_visits},
    ),
    Check(
        id="C5-soft-value-iteration",
        run=optimum_is_the_gibbs_tilt,
        part=soft_optimum,
        twins={"hard-values-tilted": greedy_tilt},
    ),
    Check(
        id="C5-published-numbers",
        run=bandit_numbers_are_the_published_ones,
        part=soft_optimum,
        twins={"beta-upside-down": other_way_round},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_a_check_without_a_twin_is_refused() -> None:
    with pytest.raises(ValueError, match="must have a planted-bug twin"):
        Check(id="C0", run=values_are_the_mean_scores, part=policy_values, twins={})


def test_a_twin_that_passes_is_a_failure_of_the_check() -> None:
    check = Check(id="C0", run=lambda part: None, part=None, twins={"any": None})
    Case(check=check, twin=None).verify()
    with pytest.raises(pytest.fail.Exception, match="must catch the planted bug 'any'"):
        Case(check=check, twin="any").verify()


def test_value_iteration_is_the_limit_without_penalty() -> None:
    uniform = np.full((4, 2), 0.5)
    optimum = soft_optimum(RING, uniform, 1e-4)
    assert optimum.soft_values == pytest.approx(optimal_values(RING), abs=1e-3)
    # By hand: state 3 ends with 2; 2 -> 3, 1 -> 2 for 0.5; state 0 goes back to 3 for 1 each time it pays off.
    assert optimal_values(RING)[3] == pytest.approx(2.0)
    assert optimal_values(RING)[0] == pytest.approx(1.0 + 0.9 * 2.0)


def test_the_frontier_has_the_wanted_kl_and_no_policy_there_is_better() -> None:
    reference = softmax(LOGITS)
    best = frontier_at_kl(WRITING, reference, 0.4)
    assert best.kl == pytest.approx(0.4, abs=1e-9)
    more = frontier_at_kl(WRITING, reference, 0.401)
    assert (more.score - best.score) / 0.001 == pytest.approx(best.beta, rel=1e-3), "beta is the slope"
    for _ in range(40):
        policy = softmax(np.log(best.policy) + GENERATOR.normal(size=best.policy.shape) * 0.3)
        kl = float(WRITING.start @ policy_values(WRITING, policy, relative_entropy(policy, reference)))
        assert expected_score(WRITING, policy) < frontier_at_kl(WRITING, reference, kl).score
