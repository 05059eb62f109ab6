"""From a step's rewards and values to advantages, by hand: two groups of two responses of different lengths.

group A   a   2 tokens, ended      rewards  -.1  1        values  .5  .2         ratios  .5  2
          b   1 token, cut off               .3                   .1       (.4)          2
group B   c   3 tokens, cut off             0  .2  .4             .3 -.1 .2 (.6)         1  .5  4
          d   1 token, ended                -.2                   .2                     .25
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from learner.advantages import group_relative, leave_one_out
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.estimators import Advantages, Experience
from tests.checks import Case, Check, with_twins

Rows = Sequence[Sequence[float]]
Estimator = Callable[[Experience, AlgorithmConfig], Advantages]

REWARDS: Rows = [[-0.1, 1.0], [0.3], [0.0, 0.2, 0.4], [-0.2]]
VALUES: Rows = [[0.5, 0.2, 0.0], [0.1, 0.4], [0.3, -0.1, 0.2, 0.6], [0.2, 0.0]]
RATIOS: Rows = [[0.5, 2.0], [2.0], [1.0, 0.5, 4.0], [0.25]]


def tensors(rows: Rows) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


EXPERIENCE = Experience(
    group_sizes=(2, 2),
    rewards=tensors(REWARDS),
    values=tensors(VALUES),
    log_ratios=[row.log() for row in tensors(RATIOS)],
    baseline=0.25,
)


def settings(**changes: Any) -> AlgorithmConfig:
    if changes.get("advantage") == "vtrace":
        changes["off_policy"] = {"weight": "none"}
    return AlgorithmConfig.model_validate({"whiten_advantages": False, **changes})


def estimate(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    return estimator_of(algorithm)(experience, algorithm)


def are(actual: Sequence[torch.Tensor] | None, expected: Rows | None, tolerance: float = 1e-9) -> None:
    assert (actual is None) == (expected is None)
    for row, numbers in zip(actual or (), expected or (), strict=True):
        wanted = torch.tensor(numbers, dtype=row.dtype)
        torch.testing.assert_close(row, wanted, rtol=0, atol=tolerance)


def by_hand(
    algorithm: AlgorithmConfig, advantages: Rows, returns: Rows | None = None, tolerance: float = 1e-9
) -> Callable[[Estimator], None]:
    def run(estimator: Estimator) -> None:
        result = estimator(EXPERIENCE, algorithm)
        are(result.advantages, advantages, tolerance)
        are(result.returns, returns)

    return run


def changed(**fields: Any) -> Estimator:
    """An estimator that sees another experience."""
    return lambda experience, algorithm: estimate(replace(experience, **fields), algorithm)


def configured(**fields: Any) -> Estimator:
    """An estimator that reads other settings."""
    return lambda experience, algorithm: estimate(experience, algorithm.model_copy(update=fields))


def padded_at_the_end(experience: Experience, algorithm: AlgorithmConfig) -> Advantages:
    """Rows aligned at their beginnings: the value after the last token is where the recursion does not look."""
    length = max(len(row) for row in experience.rewards)

    def pad(rows: Sequence[torch.Tensor], width: int) -> list[torch.Tensor]:
        return [torch.cat([row, row.new_zeros(width - len(row))]) for row in rows]

    longer = replace(
        experience,
        rewards=pad(experience.rewards, length),
        values=pad([row[:-1] for row in experience.values], length + 1),
        log_ratios=pad(experience.log_ratios, length),
    )
    result = estimate(longer, algorithm)
    sizes = [len(row) for row in experience.rewards]
    return Advantages(
        advantages=[row[:size] for row, size in zip(result.advantages, sizes, strict=True)],
        returns=[row[:size] for row, size in zip(result.returns or (), sizes, strict=True)],
    )


ONE_GROUP = changed(group_sizes=(4,))
ENDED = changed(values=[torch.cat([row[:-1], row.new_zeros(1)]) for row in EXPERIENCE.values])
ON_POLICY = changed(log_ratios=[torch.zeros_like(row) for row in EXPERIENCE.log_ratios])
UPSIDE_DOWN = changed(log_ratios=[-row for row in EXPERIENCE.log_ratios])
SCORE_ONLY = changed(rewards=[torch.cat([torch.zeros_like(row[:-1]), row[-1:]]) for row in EXPERIENCE.rewards])
RETURNS = {"advantage": "returns"}
DISCOUNTED = {"gamma": 0.5}

CHECKS = (
    Check(
        id="returns",
        run=by_hand(settings(**RETURNS), [[0.9, 1.0], [0.3], [0.6, 0.6, 0.4], [-0.2]]),
        part=estimate,
        twins={"score-only": SCORE_ONLY, "with-a-baseline": configured(baseline="batch_mean")},
    ),
    Check(
        id="returns-discounted",
        run=by_hand(settings(**RETURNS, **DISCOUNTED), [[0.4, 1.0], [0.3], [0.2, 0.4, 0.4], [-0.2]]),
        part=estimate,
        twins={"not-discounted": configured(gamma=1.0)},
    ),
    Check(  # the mean of .9 .3 .6 -.2 is .4
        id="returns-batch-mean",
        run=by_hand(settings(**RETURNS, baseline="batch_mean"), [[0.5, 0.6], [-0.1], [0.2, 0.2, 0], [-0.6]]),
        part=estimate,
        twins={"of-the-group": configured(baseline="group_mean"), "score-only": SCORE_ONLY},
    ),
    Check(  # .6 and .2
        id="returns-group-mean",
        run=by_hand(settings(**RETURNS, baseline="group_mean"), [[0.3, 0.4], [-0.3], [0.4, 0.4, 0.2], [-0.4]]),
        part=estimate,
        twins={"of-the-batch": ONE_GROUP, "shifted-groups": changed(group_sizes=(1, 3))},
    ),
    Check(
        id="returns-ema",
        run=by_hand(settings(**RETURNS, baseline="ema"), [[0.65, 0.75], [0.05], [0.35, 0.35, 0.15], [-0.45]]),
        part=estimate,
        twins={"own-batch": configured(baseline="batch_mean"), "forgotten": changed(baseline=0.0)},
    ),
    Check(  # .9 - .3 and .6 + .2, the KL penalty of every token included
        id="leave-one-out",
        run=by_hand(settings(advantage="leave_one_out"), [[0.6, 0.6], [-0.6], [0.8, 0.8, 0.8], [-0.8]]),
        part=estimate,
        twins={
            "own-return-in-the-mean": configured(advantage="group", scale_by_std=False),
            "of-the-batch": ONE_GROUP,
            "score-only": SCORE_ONLY,
        },
    ),
    Check(
        id="group",
        run=by_hand(settings(advantage="group", scale_by_std=False), [[0.3, 0.3], [-0.3], [0.4, 0.4, 0.4], [-0.4]]),
        part=estimate,
        twins={"scaled": configured(scale_by_std=True), "of-the-batch": ONE_GROUP},
    ),
    Check(  # two returns lie 1 / sqrt 2 of their sample deviation from the mean, whatever they are
        id="group-std",
        run=by_hand(
            settings(advantage="group"), [[0.70711] * 2, [-0.70711], [0.70711] * 3, [-0.70711]], tolerance=5e-6
        ),
        part=estimate,
        twins={"not-scaled": configured(scale_by_std=False), "of-the-batch": ONE_GROUP},
    ),
    Check(  # r + .5 V' - V
        id="n-step-1",
        run=by_hand(
            settings(advantage="n_step", n_step=1, **DISCOUNTED),
            [[-0.5, 0.8], [0.4], [-0.35, 0.4, 0.5], [-0.4]],
            [[0.0, 1.0], [0.5], [-0.05, 0.3, 0.7], [-0.2]],
        ),
        part=estimate,
        twins={"two-steps": configured(n_step=2), "all-ended": ENDED, "padded-at-the-end": padded_at_the_end},
    ),
    Check(
        id="n-step-2",
        run=by_hand(
            settings(advantage="n_step", n_step=2, **DISCOUNTED),
            [[-0.1, 0.8], [0.4], [-0.15, 0.65, 0.5], [-0.4]],
            [[0.4, 1.0], [0.5], [0.15, 0.55, 0.7], [-0.2]],
        ),
        part=estimate,
        twins={"one-step": configured(n_step=1), "to-the-end": configured(n_step=3), "all-ended": ENDED},
    ),
    Check(  # temporal differences as above, decaying by .25
        id="gae",
        run=by_hand(
            settings(gae_lambda=0.5, **DISCOUNTED),
            [[-0.3, 0.8], [0.4], [-0.21875, 0.525, 0.5], [-0.4]],
            [[0.2, 1.0], [0.5], [0.08125, 0.425, 0.7], [-0.2]],
        ),
        part=estimate,
        twins={"lambda-1": configured(gae_lambda=1.0), "all-ended": ENDED, "padded-at-the-end": padded_at_the_end},
    ),
    Check(  # rho .5 1.5 | 1.5 | 1 .5 1.5 | .25; c .25 .4 | .4 | .4 .25 .4 | .125, lambda included
        id="vtrace",
        run=by_hand(
            settings(advantage="vtrace", gae_lambda=0.5, vtrace_rho=1.5, vtrace_c=0.8, **DISCOUNTED),
            [[-0.1, 1.2], [0.6], [-0.2765625, 0.29375, 0.75], [-0.1]],
            [[0.4, 1.4], [0.7], [0.00875, 0.19375, 0.95], [0.1]],
        ),
        part=estimate,
        twins={
            "on-policy": ON_POLICY,
            "upside-down": UPSIDE_DOWN,
            "rho-not-truncated": configured(vtrace_rho=9.0),
            "trace-not-truncated": configured(vtrace_c=9.0),
            "all-ended": ENDED,
            "padded-at-the-end": padded_at_the_end,
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize("n_step", [3, 99])
def test_n_steps_to_the_end_are_gae_with_lambda_one(n_step) -> None:
    long = estimate(EXPERIENCE, settings(advantage="n_step", n_step=n_step, **DISCOUNTED))
    by_gae = estimate(EXPERIENCE, settings(gae_lambda=1.0, **DISCOUNTED))
    are(long.advantages, [row.tolist() for row in by_gae.advantages])
    are(long.returns, [row.tolist() for row in by_gae.returns])
    are(long.advantages[2:3], [[-0.025, 0.65, 0.5]])


def test_a_group_of_one_has_nothing_to_be_compared_with() -> None:
    alone = replace(EXPERIENCE, group_sizes=(1, 3))
    for advantage in ("leave_one_out", "group"):
        with pytest.raises(ValueError, match=r"at least 2 responses to one prompt.*raise rollouts\.samples_per_prompt"):
            estimate(alone, settings(advantage=advantage))


def equal_scores_have_no_advantage(implementation) -> None:
    for size in (3, 6, 7, 8, 12, 16, 64):
        for score in (0.1, 0.7, 5.7, 13.37):
            assert not implementation(torch.full((size,), score)).any(), (size, score)


def in_float32(scores):
    return (scores - scores.mean()) / (scores.std() + 1e-6)


def test_a_group_of_equal_scores_has_no_advantage() -> None:
    equal_scores_have_no_advantage(partial(group_relative, scale_by_std=True))
    equal_scores_have_no_advantage(leave_one_out)


def test_rounding_that_is_scaled_up_is_caught() -> None:
    with pytest.raises(AssertionError):
        equal_scores_have_no_advantage(in_float32)
