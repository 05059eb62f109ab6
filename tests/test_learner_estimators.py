"""From a step's rewards and values to advantages, by hand: two groups of two responses of different lengths.

group A   a   2 tokens, ended      rewards  -.1  1        values  .5  .2         ratios  .5  2
          b   1 token, cut off               .3                   .1       (.4)          2
group B   c   3 tokens, cut off             0  .2  .4             .3 -.1 .2 (.6)         1  .5  4
          d   1 token, ended                -.2                   .2                     .25
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from learner.advantages import whiten
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of
from learner.batch import StepPlan
from learner.config import LearnerConfig
from learner.controller import StepController
from learner.estimators import Advantages, Experience
from learner.experience import FirstPass, SampleTargets, judge
from learner.samples import Sample
from reward.config import ComponentConfig, RewardConfig
from reward.schema import SAMPLES
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


# From recorded log-probs and scores: a 2 tokens, b 1, c 2 (the second not the policy's own), d 1.

SCORES = (1.0, 0.0, 0.5, 0.7)
LOG_RATIOS: Rows = [[0.2, -0.4], [0.4], [0.2, 9.0], [0.0]]  # log(policy / reference)
MASKS = ([True, True], [True], [True, False], [True])
Judge = Callable[[Sequence[Sample], Sequence[FirstPass], StepPlan, AlgorithmConfig], Any]


def recorded(finish_reasons: Sequence[str] = ("eos",) * 4) -> list[Sample]:
    return [
        Sample(
            prompt_ids=np.zeros(1, np.int64),
            response_ids=np.zeros(len(ratios), np.int64),
            logprobs=torch.full((len(ratios),), -1.0),
            ref_logprobs=-1.0 - torch.tensor(ratios),
            policy_versions=torch.zeros(len(ratios), dtype=torch.int32),
            loss_mask=torch.tensor(mask),
            token_scores=None,
            finish_reason=reason,
        )
        for ratios, mask, reason in zip(LOG_RATIOS, MASKS, finish_reasons, strict=True)
    ]


def plan(kl_coef: float = 0.5, baseline: float = 0.0) -> StepPlan:
    return StepPlan(
        step=1,
        group_ids=("A", "B"),
        group_sizes=(2, 2),
        scores=np.array(SCORES),
        kl_coef=kl_coef,
        baseline=baseline,
        updates=(),
        value_ranks=(),
    )


def without_values(samples: Sequence[Sample]) -> list[FirstPass]:
    return [FirstPass(values=torch.zeros(len(sample.logprobs) + 1)) for sample in samples]


def own_advantages(targets: Sequence[SampleTargets]) -> list[float]:
    """Of the policy's own tokens."""
    return [a for t, mask in zip(targets, MASKS, strict=True) for a in t.advantages[torch.tensor(mask)].tolist()]


def reinforce_plus_plus_by_hand(implementation: Judge) -> None:
    """Penalties -.1 .2 | -.2 | -.1 0 | 0; returns 1.1 1.2 | -.2 | .4 (.5) | .7: mean .64, variance .2584."""
    samples, algorithm = recorded(), AlgorithmConfig.model_validate("reinforce_plus_plus")
    targets, metrics = implementation(samples, without_values(samples), plan(), algorithm)
    expected = [(a - 0.64) / 0.2584**0.5 for a in (1.1, 1.2, -0.2, 0.4, 0.7)]
    assert own_advantages(targets) == pytest.approx(expected, abs=1e-6)
    assert metrics["advantage_mean"] == pytest.approx(0.64)
    assert metrics["advantage_std"] == pytest.approx(0.2584**0.5)
    assert "value_explained_variance" not in metrics


def reinforce_plus_plus_baseline_by_hand(implementation: Judge) -> None:
    """Scores less their groups' .5 and .6: .5 .5 | -.5 | -.1 (-.1) | .1, mean .1, variance .144; KL in the loss."""
    samples, algorithm = recorded(), AlgorithmConfig.model_validate("reinforce_plus_plus_baseline")
    targets, _ = implementation(samples, without_values(samples), plan(), algorithm)
    expected = [(a - 0.1) / 0.144**0.5 for a in (0.5, 0.5, -0.5, -0.1, 0.1)]
    assert own_advantages(targets) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(targets[0].ref_logprobs, torch.tensor([-1.2, -0.6]))


def judged(**changes: Any) -> Judge:
    """A judge that reads other settings."""
    return lambda samples, first, plan, algorithm: judge(samples, first, plan, algorithm.model_copy(update=changes))


def planned(**changes: Any) -> Judge:
    return lambda samples, first, plan, algorithm: judge(samples, first, replace(plan, **changes), algorithm)


def every_token(samples, first_pass, plan, algorithm):
    own = [replace(sample, loss_mask=torch.ones_like(sample.loss_mask)) for sample in samples]
    return judge(own, first_pass, plan, algorithm)


def whitened_over_responses(samples, first_pass, plan, algorithm):
    plain = algorithm.model_copy(update={"whiten_advantages": False})
    targets, metrics = judge(samples, first_pass, plan, plain)
    firsts = torch.stack([target.advantages[0] for target in targets])
    mean, variance = float(firsts.mean()), float(firsts.var(correction=0))
    return [replace(t, advantages=whiten(t.advantages, mean, variance)) for t in targets], metrics


def bootstraps_where_cut_off(implementation: Judge) -> None:
    """All values .5, lambda 1: the return of b, cut off, is 0 - .2 + .5; of the others score and penalties."""
    samples = recorded(("eos", "length", "stop", "eos"))
    first = [FirstPass(values=torch.full((len(s.logprobs) + 1,), 0.5)) for s in samples]
    targets, _ = implementation(samples, first, plan(), settings(gae_lambda=1.0))
    are([t.returns for t in targets], [[1.1, 1.2], [0.3], [0.4, 0.5], [0.7]], 1e-6)
    are([t.advantages for t in targets], [[0.6, 0.7], [-0.2], [-0.1, 0.0], [0.2]], 1e-6)


def masked_tokens_are_on_policy(implementation: Judge) -> None:
    """What stands recorded at a token that the policy did not choose is no importance weight: V-trace is GAE there."""
    samples = recorded()
    wrong = [torch.where(sample.loss_mask, -1.0, -50.0) for sample in samples]
    first = [FirstPass(values=torch.ones(len(s.logprobs) + 1), logprobs=w) for s, w in zip(samples, wrong, strict=True)]
    traced, _ = implementation(samples, first, plan(), settings(advantage="vtrace"))
    by_gae, _ = judge(samples, first, plan(), settings())
    are([t.returns for t in traced], [t.returns.tolist() for t in by_gae], 1e-6)


JUDGED = (
    Check(
        id="reinforce-plus-plus",
        run=reinforce_plus_plus_by_hand,
        part=judge,
        twins={
            "no-penalty": planned(kl_coef=0.0),
            "penalty-with-the-other-sign": planned(kl_coef=-0.5),
            "not-whitened": judged(whiten_advantages=False),
            "over-responses": whitened_over_responses,
            "masked-tokens-count": every_token,
        },
    ),
    Check(
        id="reinforce-plus-plus-baseline",
        run=reinforce_plus_plus_baseline_by_hand,
        part=judge,
        twins={
            "mean-of-the-batch": judged(baseline="batch_mean"),
            "no-baseline": judged(baseline="none"),
            "penalty-in-the-reward": judged(kl=AlgorithmConfig().kl),
            "masked-tokens-count": every_token,
        },
    ),
    Check(
        id="bootstrap",
        run=bootstraps_where_cut_off,
        part=judge,
        twins={"the-limit-ends": judged(missing_eos_penalty=1.0), "no-penalty": planned(kl_coef=0.0)},
    ),
    Check(
        id="vtrace-of-own-tokens",
        run=masked_tokens_are_on_policy,
        part=judge,
        twins={"masked-tokens-count": every_token},
    ),
)


@with_twins(JUDGED)
def test_judged(case: Case) -> None:
    case.verify()


# The moving average through the controller that keeps it.


def table(step: int, scores: Sequence[float]) -> pa.Table:
    rows = [
        {
            "group_id": f"{step}/{'AB'[index // 2]}",
            "sample_index": index % 2,
            "num_prompt_tokens": 1,
            "num_response_tokens": len(MASKS[index]),
            "num_loss_tokens": sum(MASKS[index]),
            "finish_reason": "eos",
            "components": [("judge", score)],
            "kl": 0.0,
            "oldest_version": 0,
            "newest_version": 0,
        }
        for index, score in enumerate(scores)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


class ObservesFirst(StepController):
    """The planted bug: a step's own scores are in its baseline."""

    def plan(self, step: int, samples: pa.Table) -> StepPlan:
        first = super().plan(step, samples)
        self.observe(first, samples, {})
        return super().plan(step, samples)


class NeverObserves(StepController):
    def observe(self, *_: Any) -> None:
        return


def advantages_of_steps(controller: StepController, algorithm: AlgorithmConfig, steps: Sequence[Sequence[float]]):
    found = []
    for step, scores in enumerate(steps, start=1):
        samples, rows = table(step, scores), recorded()
        step_plan = controller.plan(step, samples)
        targets, _ = judge(rows, without_values(rows), step_plan, algorithm)
        controller.observe(step_plan, samples, {})
        found.append([float(target.advantages[0]) for target in targets])
    return found


def baseline_is_of_earlier_steps(controller_type: type[StepController]) -> None:
    """Means 1, 2, 4 and decay .5: baselines 0, 1, 1.5; a sample's own score moves its own advantage alone."""
    algorithm = AlgorithmConfig.model_validate({"name": "reinforce_ema", "baseline_decay": 0.5, "kl": {"coef": 0.0}})
    reward = RewardConfig(components={"judge": ComponentConfig(function="a:b")})
    steps = [(2.0, 0.0, 1.0, 1.0), (3.0, 1.0, 2.0, 2.0), (4.0, 4.0, 4.0, 4.0)]

    def run(third: Sequence[float]) -> list[list[float]]:
        config = LearnerConfig(num_minibatches=1)
        controller = controller_type(reward, config, algorithm, num_steps=3, seed=0, max_new_tokens=8)
        return advantages_of_steps(controller, algorithm, [*steps[:2], third])

    expected = [[2.0, 0.0, 1.0, 1.0], [2.0, 0.0, 1.0, 1.0], [2.5, 2.5, 2.5, 2.5]]
    assert np.allclose(run(steps[2]), expected)
    assert np.allclose(run((40.0, 4.0, 4.0, 4.0))[2], [38.5, 2.5, 2.5, 2.5])


EMA = (
    Check(
        id="ema-of-earlier-steps",
        run=baseline_is_of_earlier_steps,
        part=StepController,
        twins={"own-step": ObservesFirst, "never": NeverObserves},
    ),
)


@with_twins(EMA)
def test_baseline(case: Case) -> None:
    case.verify()
