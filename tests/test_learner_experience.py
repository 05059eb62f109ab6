"""From recorded log-probs and scores to a step's targets, by hand, and the moving average between steps.

Two groups of two responses: a of 2 tokens and b of 1, c of 2 (the second not the policy's own) and d of 1.
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
from learner.batch import StepPlan
from learner.config import LearnerConfig
from learner.controller import StepController
from learner.experience import FirstPass, judge
from learner.objective import Targets
from learner.samples import Sample
from reward.config import ComponentConfig, RewardConfig
from reward.schema import SAMPLES
from tests.checks import Case, Check, with_twins

Rows = Sequence[Sequence[float]]

SCORES = (1.0, 0.0, 0.5, 0.7)
LOG_RATIOS: Rows = [[0.2, -0.4], [0.4], [0.2, 9.0], [0.0]]  # log(policy / reference)
MASKS = ([True, True], [True], [True, False], [True])
Judge = Callable[[Sequence[Sample], Sequence[FirstPass], StepPlan, AlgorithmConfig], Any]


def settings(**changes: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"whiten_advantages": False, **changes})


def are(actual: Sequence[torch.Tensor], expected: Rows) -> None:
    for row, numbers in zip(actual, expected, strict=True):
        torch.testing.assert_close(row, torch.tensor(numbers), rtol=0, atol=1e-6)


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


def own_advantages(targets: Sequence[Targets]) -> list[float]:
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
    are([t.returns for t in targets], [[1.1, 1.2], [0.3], [0.4, 0.5], [0.7]])
    are([t.advantages for t in targets], [[0.6, 0.7], [-0.2], [-0.1, 0.0], [0.2]])


def masked_tokens_are_on_policy(implementation: Judge) -> None:
    """What stands recorded at a token that the policy did not choose is no importance weight: V-trace is GAE there."""
    samples = recorded()
    wrong = [torch.where(sample.loss_mask, -1.0, -50.0) for sample in samples]
    first = [FirstPass(values=torch.ones(len(s.logprobs) + 1), logprobs=w) for s, w in zip(samples, wrong, strict=True)]
    traced, _ = implementation(samples, first, plan(), settings(advantage="vtrace", off_policy={"weight": "none"}))
    by_gae, _ = judge(samples, first, plan(), settings())
    are([t.returns for t in traced], [t.returns.tolist() for t in by_gae])


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


CHECKS = (
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
    Check(
        id="ema",
        run=baseline_is_of_earlier_steps,
        part=StepController,
        twins={"own-step": ObservesFirst, "never": NeverObserves},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()
