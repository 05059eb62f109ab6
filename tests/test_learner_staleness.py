"""Samples of older policies in a float32 run: which tokens are compared, how they weigh, how they are counted."""

import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from learner.algorithm_config import AlgorithmConfig
from learner.learner import LearnerRank, MismatchError
from learner.meters import staleness
from learner.samples import read_samples
from tests.checks import Case, Check, with_twins
from tests.learner_toys import learner_config, learner_rank, toy_batch, toy_directory

CONFIG = learner_config(num_minibatches=1, epochs=1)
Versions = Callable[[int], list[int]]


@functools.cache
def toy() -> str:
    return toy_directory(Path(tempfile.mkdtemp()))


def new(count: int) -> list[int]:
    return [1] * count


def old(count: int) -> list[int]:
    return [0] * count


def continued(count: int) -> list[int]:
    """All but the first token are of the newest version, but follow on old keys and values."""
    return [0] + [1] * (count - 1)


def recorded(versions: Versions, shift: float) -> list[pa.Table]:
    """Step 2's batch with other versions, and log-probs that are off."""
    tables = []
    for table in toy_batch(toy(), CONFIG, step=2).tables:
        rows = table.to_pylist()
        for row in rows:
            row["policy_versions"] = versions(len(row["response_ids"]))
            row["logprobs"] = [value + shift for value in row["logprobs"]]
        tables.append(pa.Table.from_pylist(rows, schema=table.schema))
    return tables


def step_two(versions: Versions, shift: float, *, max_staleness: int = 1, **algorithm: Any) -> dict[str, float]:
    """Learn step 2 from the weights that the toy's log-probs come from, published as version 1."""
    learner = learner_rank(
        toy(), CONFIG, algorithm=AlgorithmConfig(name="grpo", **algorithm), max_staleness=max_staleness
    )
    learner.publish(1, 0)
    metrics = learner.step(recorded(versions, shift), toy_batch(toy(), CONFIG, step=2).plan)
    assert isinstance(metrics, dict)
    return metrics


def only_whole_samples_are_compared(gap: Callable[..., torch.Tensor]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LearnerRank, "_gap", gap)
        try:
            assert step_two(old, 0.5)["learner_logprob_gap"] == 0.0
            assert step_two(continued, 0.5)["learner_logprob_gap"] == 0.0
        except MismatchError as error:
            raise AssertionError("compared what other weights sampled") from error
        try:
            step_two(new, 0.5)
        except MismatchError:
            return
        raise AssertionError("other log-probs for the same weights were not found")


def by_token(learner: LearnerRank, differences: torch.Tensor, samples: Any, plan: Any) -> torch.Tensor:
    is_new = torch.cat([s.policy_versions for s in samples]) == plan.step - 1
    return torch.where(torch.cat([s.loss_mask for s in samples]) & is_new, differences.abs(), 0.0).max()


def nothing(learner: LearnerRank, differences: torch.Tensor, samples: Any, plan: Any) -> torch.Tensor:
    return torch.zeros(())


CHECKS = (
    Check(
        id="gap",
        run=only_whole_samples_are_compared,
        part=LearnerRank._gap,
        twins={"by-token": by_token, "nothing": nothing},
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


def test_a_replay_without_publishing_compares_nothing_with_what_was_published_last():
    """Version 0 is published, step 1 changes the weights, step 2 still holds tokens of version 0."""
    learner = learner_rank(toy(), CONFIG, algorithm=AlgorithmConfig(name="grpo"), max_staleness=1)
    learner.publish(0, 0)
    first = toy_batch(toy(), CONFIG, step=1)
    learner.step(first.tables, first.plan)
    metrics = learner.step(recorded(old, 0.0), toy_batch(toy(), CONFIG, step=2).plan)
    assert metrics["learner_logprob_gap"] == 0.0
    assert metrics["mismatch_k3"] > 1e-6  # the weights did change


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (9.0, 2.0)])
def test_stale_tokens_weigh_old_over_recorded_truncated(ratio, weight):
    """policy_loss at ratio 1 is -sum weight * advantage: against the same step whose recorded log-probs are right."""
    settings: dict[str, Any] = {"kl": {"coef": 0.0}, "aggregation": "token_mean"}
    right, stale = step_two(old, 0.0, **settings), step_two(old, -math.log(ratio), **settings)
    assert abs(right["policy_loss"]) > 1e-3
    assert stale["policy_loss"] == pytest.approx(weight * right["policy_loss"], rel=1e-4)
    assert stale["ratio_max"] == pytest.approx(1.0, abs=1e-5)  # to the policy at the step's start
    assert stale["mismatch_ratio_max"] == pytest.approx(ratio, rel=1e-4)


def test_without_staleness_records_stay_the_old_policy():
    assert step_two(old, 0.5, max_staleness=0)["ratio_max"] == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert not any(name.startswith("staleness") for name in step_two(new, 0.0, max_staleness=0))


def test_staleness_by_hand():
    """Loss tokens only: the toy masks each response's second token."""
    batch = toy_batch(toy(), CONFIG, step=2)
    samples = read_samples(recorded(continued, 0.0), batch.plan)
    num_tokens = sum(int(sample.loss_mask.sum()) for sample in samples)
    found = staleness(samples, batch.plan, 2)
    share = len(samples) / num_tokens  # each response's first token is one version old
    expected = {"staleness_mean": share, "staleness_max": 1.0, "staleness_0": 1 - share, "staleness_1": share}
    assert found == pytest.approx(expected | {"staleness_2": 0.0})
    assert found.items() <= step_two(continued, 0.0, max_staleness=2).items()
