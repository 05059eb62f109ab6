"""The Lagrangian constraint: steps by hand, its linear programme, exact resume; and penalties on length."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import linprog

from learner.algorithm_config import AlgorithmConfig
from learner.constraint import Constraint
from learner.penalties import Penalties
from reward.config import ConstraintConfig
from tests.checks import Case, Check, with_twins

REWARDS, COSTS, LIMIT = np.array([0.0, 1.5, 2.0]), np.array([-1.0, 0.5, 2.0]), 0.0
"""Three arms. By hand: the best mixture that costs 0 is (1/3, 2/3, 0), worth 1; a unit of cost is worth 1.5 / 1.5."""
BETA = 0.02
"""Of the KL to the uniform policy, which makes the bandit's saddle point one that is reached and not circled."""


def solves_its_linear_programme(constraint_type) -> None:
    """C10: policy gradient against the multiplier ends in the programme's mixture, with its dual as the multiplier."""
    programme = linprog(-REWARDS, A_ub=[COSTS], b_ub=[LIMIT], A_eq=[np.ones(3)], b_eq=[1.0])
    mixture, dual = programme.x, -programme.ineqlin.marginals[0]
    np.testing.assert_allclose(mixture, [1 / 3, 2 / 3, 0.0], atol=1e-9)
    assert dual == pytest.approx(1.0)
    constraint = constraint_type(
        ConstraintConfig(limit=LIMIT, initial_lambda=0.2, learning_rate=0.02, window=1, max_lambda=20.0)
    )
    logits = np.zeros(3)
    for step in range(1, 6001):
        policy = _softmax(logits)
        scores = constraint.combined(REWARDS, COSTS) - BETA * np.log(3 * policy)
        logits += 0.5 * (scores - policy @ scores)  # the natural gradient of what is expected
        constraint.update(np.array([policy @ COSTS]), step=step)
    np.testing.assert_allclose(_softmax(logits), mixture, atol=0.01)
    assert constraint.multiplier == pytest.approx(dual, abs=0.05)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


class DescendsOnLambda(Constraint):
    """Planted: the multiplier falls where the limit is broken."""

    def update(self, costs, *, step):
        super().update(2 * LIMIT - costs, step=step)


class RewardsCost(Constraint):
    """Planted: costs are added."""

    def combined(self, scores, costs):
        return super().combined(scores, -costs)


class IgnoresTheLimit(Constraint):
    """Planted: the multiplier stays."""

    def update(self, costs, *, step):
        pass


class AddsTheLimit(Constraint):
    """Planted: E[C] + limit in place of E[C] - limit."""

    def update(self, costs, *, step):
        super().update(costs + 2 * self._config.limit, step=step)


def moves_as_by_hand(constraint_type) -> None:
    """Limit 0.5, rate 0.1, lambda 2, a window of 3, one step of delay."""
    one = constraint_type(ConstraintConfig(limit=0.5, initial_lambda=2.0, learning_rate=0.1, window=3, delay_steps=1))
    # (R - 2 C) / 3: (1 - 2) / 3, (1 + 4) / 3; a response without a cost: 1 / 3.
    np.testing.assert_allclose(one.combined(np.ones(3), np.array([1.0, -2.0, np.nan])), [-1 / 3, 5 / 3, 1 / 3])
    one.update(np.array([9.0, 1.0]), step=1)
    assert one.multiplier == pytest.approx(2.0, rel=1e-12)
    # The window is 1, 3, 2: mean 2, 1.5 above the limit, so log(lambda) moves by 0.1 * 2 * 1.5 = 0.3.
    one.update(np.array([3.0, np.nan, 2.0]), step=2)
    assert one.multiplier == pytest.approx(2.0 * math.exp(0.3))
    # A step with more sequences than the window counts whole: mean 0.25, so it moves by 0.1 * 2.6997 * -0.25.
    one.update(np.array([1.0, 0.0, 0.0, 0.0]), step=3)
    assert math.log(one.multiplier) == pytest.approx(math.log(2.0) + 0.3 - 0.025 * 2.0 * math.exp(0.3))


class NoDelay(Constraint):
    """Planted: moves from the first step on."""

    def update(self, costs, *, step):
        super().update(costs, step=step + 1)


class LinearLambda(Constraint):
    """Planted: the step of log(lambda) lacks the factor lambda."""

    def update(self, costs, *, step):
        super().update(self._config.limit + (costs - self._config.limit) / self.multiplier, step=step)


class NoScale(Constraint):
    """Planted: not divided by 1 + lambda."""

    def combined(self, scores, costs):
        return super().combined(scores, costs) * (1.0 + self.multiplier)


CHECKS = (
    Check(
        id="C10-lagrangian-lp",
        run=solves_its_linear_programme,
        part=Constraint,
        twins={"descends-on-lambda": DescendsOnLambda, "rewards-cost": RewardsCost, "lambda-stays": IgnoresTheLimit},
    ),
    Check(
        id="lagrangian-by-hand",
        run=moves_as_by_hand,
        part=Constraint,
        twins={"adds-the-limit": AddsTheLimit, "no-delay": NoDelay, "linear-lambda": LinearLambda, "no-scale": NoScale},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_sampled_costs_settle_at_the_limit_as_well() -> None:
    """Batches of 64 and the window of the default, as a run would have them; means over the second half.

    The noise keeps the two players circling, and what averages to the saddle point on a circle is lambda's share of the
    score, lambda / (1 + lambda): the policy stays within bounds only if its mean drift is 0.
    """
    constraint = Constraint(ConstraintConfig(limit=LIMIT, initial_lambda=0.2, learning_rate=0.02))
    generator, logits, means = np.random.default_rng(0), np.zeros(3), []
    for step in range(1, 3001):
        policy = _softmax(logits)
        arms = generator.choice(3, size=64, p=policy)
        scores = constraint.combined(REWARDS[arms], COSTS[arms]) - BETA * np.log(3 * policy[arms])
        advantages = scores - scores.mean()
        logits += 0.2 * ((arms[:, None] == np.arange(3)) - policy).T @ advantages / len(arms)
        constraint.update(COSTS[arms], step=step)
        share = constraint.multiplier / (1.0 + constraint.multiplier)
        means.append((policy @ COSTS, policy @ REWARDS, share))
    cost, reward, share = np.mean(means[1500:], axis=0)
    assert cost == pytest.approx(LIMIT, abs=0.02)
    assert reward == pytest.approx(1.0, abs=0.03)
    assert share == pytest.approx(0.5, abs=0.02)


def test_the_multiplier_ends_at_its_maximum_and_comes_back() -> None:
    one = Constraint(ConstraintConfig(learning_rate=1.0, max_lambda=4.0, window=1))
    for step in range(1, 20):
        one.update(np.array([5.0]), step=step)
    assert one.multiplier == pytest.approx(4.0)
    one.update(np.array([-0.1]), step=20)
    assert one.multiplier == pytest.approx(4.0 * math.exp(-0.4))


def test_without_any_cost_nothing_moves() -> None:
    one = Constraint(ConstraintConfig())
    one.update(np.array([np.nan, np.nan]), step=1)
    assert one.multiplier == 1.0
    assert one.state_dict() == {"log_lambda": 0.0, "recent": []}


def test_state_goes_through_json_without_a_changed_bit() -> None:
    generator = np.random.default_rng(0)
    costs = generator.normal(size=(8, 5))
    whole, first, resumed = (Constraint(ConstraintConfig(window=7)) for _ in range(3))
    for step in range(1, 9):
        whole.update(costs[step - 1], step=step)
    for step in range(1, 5):
        first.update(costs[step - 1], step=step)
    saved = json.dumps(first.state_dict())
    resumed.load_state_dict(json.loads(saved))
    for step in range(5, 9):
        resumed.update(costs[step - 1], step=step)
    assert resumed.state_dict() == whole.state_dict()
    assert json.dumps(first.state_dict()) == saved


def samples(lengths: list[int], reasons: list[str]) -> pa.Table:
    return pa.table({"num_response_tokens": pa.array(lengths, pa.int32()), "finish_reason": reasons})


def falls_in_the_buffer(make) -> None:
    """Limit 10, buffer 4 (share 0.4), c 2: 0 up to 6 tokens, then 0.5 a token down to 2 at 10."""
    penalties = make(AlgorithmConfig(overlong_buffer=0.4, overlong_coef=2.0), max_new_tokens=10)
    found = penalties.of_samples(samples([1, 6, 7, 8, 10, 10], ["eos"] * 5 + ["length"]))
    np.testing.assert_allclose(found, [0.0, 0.0, 0.5, 1.0, 2.0, 2.0], atol=1e-12)


def _after_the_limit(algorithm, *, max_new_tokens):
    return Penalties.of(algorithm, max_new_tokens=round(1.4 * max_new_tokens))


def _without_coefficient(algorithm, *, max_new_tokens):
    return Penalties.of(algorithm.model_copy(update={"overlong_coef": 1.0}), max_new_tokens=max_new_tokens)


class _Rewarded(SimpleNamespace):
    def of_samples(self, table):
        return -self.penalties.of_samples(table)


LENGTH_CHECKS = (
    Check(
        id="dapo-eq13",
        run=falls_in_the_buffer,
        part=Penalties.of,
        twins={
            "buffer-after-the-limit": _after_the_limit,
            "no-coefficient": _without_coefficient,
            "sign": lambda a, **k: _Rewarded(penalties=Penalties.of(a, **k)),
        },
    ),
)


@with_twins(LENGTH_CHECKS)
def test_length(case: Case) -> None:
    case.verify()


def test_penalties_add_up_and_the_default_has_none() -> None:
    table = samples([5, 9, 10, 10], ["eos", "stop", "eos", "length"])
    both = Penalties(missing_eos=0.5, length_coef=0.01, overlong_coef=1.0, overlong_from=6.0, overlong_buffer=4.0)
    np.testing.assert_allclose(both.of_samples(table), [0.05, 0.84, 1.1, 1.6])
    assert Penalties.of(AlgorithmConfig(), max_new_tokens=16).of_samples(table).tolist() == [0.0] * 4
    linear = Penalties.of(AlgorithmConfig(length_coef=0.1, missing_eos_penalty=1.0), max_new_tokens=16)
    np.testing.assert_allclose(linear.of_samples(table), [0.5, 0.9, 1.0, 2.0])
