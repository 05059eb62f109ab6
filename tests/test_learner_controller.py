"""The controller: score, plan, measure, control; exact resume; figures worked by hand."""

import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from learner.config import AlgorithmConfig, KLConfig, LearnerConfig
from learner.controller import StepController
from reward.config import ComponentConfig, RewardConfig
from reward.schema import SAMPLES

ADAPTIVE = KLConfig(coef=0.15, controller="adaptive", target=6.0, horizon=10_000)
REWARD = RewardConfig(
    components={
        "accuracy": ComponentConfig(function="examples:judge", normalize="running"),
        "style": ComponentConfig(function="examples:judge", weight=0.5),
    }
)


def samples(step: int = 1, *, num_groups: int = 4, kl: float | None = 3.0) -> pa.Table:
    generator = np.random.default_rng(step)
    rows = [
        {
            "group_id": f"{step}/q{group}",
            "sample_index": index,
            "num_prompt_tokens": 4,
            "num_response_tokens": 2 + index,
            "num_loss_tokens": 2 + index,
            "finish_reason": ("eos", "stop", "length", "eos")[index],
            "components": [("accuracy", float(generator.normal())), *([("style", 1.0)] if index else [])],
            "kl": None if kl is None else kl + index,
            "oldest_version": step - 1,
            "newest_version": step - 1,
        }
        for group in range(num_groups)
        for index in range(4)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def controller(kl: KLConfig = ADAPTIVE, reward: RewardConfig = REWARD, **algorithm: float) -> StepController:
    return StepController(
        reward,
        LearnerConfig(epochs=2, num_minibatches=2, microbatch_tokens=40),
        AlgorithmConfig(kl=kl, **algorithm),
        num_steps=4,
        seed=11,
    )


def run(one: StepController, steps: range) -> list[bytes]:
    """What the ranks and the run's metrics see, as bytes."""
    seen = []
    for step in steps:
        table = samples(step)
        plan = one.plan(step, table)
        seen.append(pickle.dumps((plan, one.metrics(plan, table))))
        one.observe(plan, table)
    return seen


class _ForgetsMoments(StepController):
    def load_state_dict(self, state):
        empty = {name: {"count": 0, "mean": 0.0, "squares": 0.0} for name in state["reward"]}
        super().load_state_dict({**state, "reward": empty})


class _ForgetsKL(StepController):
    def load_state_dict(self, state):
        super().load_state_dict({**state, "kl": {"coef": 0.15}})


def check_resume(controller_type: type[StepController]) -> None:
    whole = run(controller(), range(1, 5))
    first = controller()
    before = run(first, range(1, 3))
    saved = json.dumps(first.state_dict())
    resumed = controller()
    resumed.__class__ = controller_type
    resumed.load_state_dict(json.loads(saved))
    assert before + run(resumed, range(3, 5)) == whole
    assert json.dumps(first.state_dict()) == saved


def test_two_steps_a_restart_and_two_steps_are_four_steps_bit_for_bit() -> None:
    check_resume(StepController)


@pytest.mark.parametrize("twin", [_ForgetsMoments, _ForgetsKL])
def test_a_resume_that_forgets_is_caught(twin: type[StepController]) -> None:
    with pytest.raises(AssertionError):
        check_resume(twin)


def test_the_plan_carries_scores_coefficient_and_learning_rates() -> None:
    one = controller(missing_eos_penalty=1.0)
    table = samples()
    plan = one.plan(1, table)
    assert plan.step == 1
    assert plan.kl_coef == 0.15
    assert [update.learning_rate for update in plan.updates] == [1e-5] * 4
    accuracy = np.array([dict(row)["accuracy"] for row in table["components"].to_pylist()])
    style = np.array([0.0, 0.5, 0.5, 0.5] * 4)
    expected = (accuracy - accuracy.mean()) / accuracy.std() + style - np.array([0.0, 0.0, 1.0, 0.0] * 4)
    np.testing.assert_allclose(plan.scores, expected, atol=1e-6)


def test_figures_by_hand() -> None:
    one = controller()
    table = samples()
    plan = one.plan(1, table)
    figures = one.metrics(plan, table)
    assert figures["kl_coef"] == 0.15
    assert figures["score_mean"] == plan.scores.mean()
    assert figures["score_std"] == plan.scores.std()
    assert figures["kl"] == 4.5
    assert figures["response_length_mean"] == 3.5
    assert (figures["eos_fraction"], figures["truncated_fraction"]) == (0.5, 0.25)
    assert (figures["style_mean"], figures["style_std"], figures["style_num_absent"]) == (1.0, 0.0, 4.0)
    accuracy = [dict(row)["accuracy"] for row in table["components"].to_pylist()]
    assert figures["accuracy_mean"] == pytest.approx(np.mean(accuracy))
    assert figures["accuracy_std"] == pytest.approx(np.std(accuracy))
    assert all(type(value) is float for value in figures.values())


def test_observing_moves_the_coefficient_for_the_next_step_only() -> None:
    one = controller()
    table = samples(kl=10.5)  # mean 12: twice the target, clipped to 0.2
    plan = one.plan(1, table)
    one.observe(plan, table)
    assert plan.kl_coef == 0.15
    assert one.plan(2, samples(2)).kl_coef == pytest.approx(0.15 * (1 + 0.2 * 16 / 10_000))


def test_order_of_arrival_changes_no_bit() -> None:
    table = samples()
    shuffled = table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows)))
    seen = []
    for one_table in (table, shuffled):
        one = controller()
        plan = one.plan(1, one_table)
        figures = one.metrics(plan, one_table)
        one.observe(plan, one_table)
        seen.append((pickle.dumps((plan, figures)), json.dumps(one.state_dict())))
    assert seen[0] == seen[1]


def test_evaluation_remembers_nothing_and_scores_with_the_moments_of_training() -> None:
    one = controller()
    run(one, range(1, 3))
    state = one.state_dict()
    figures = one.evaluation_metrics(samples(9))
    assert one.state_dict() == state
    assert "kl_coef" not in figures
    moments = state["reward"]["accuracy"]
    std = math.sqrt(moments["squares"] / moments["count"] + 1e-8)
    assert figures["score_mean"] == pytest.approx((figures["accuracy_mean"] - moments["mean"]) / std + 0.375)


def test_without_a_reference_policy_there_is_no_kl_and_no_penalty() -> None:
    table = samples(kl=None)
    one = controller(KLConfig(coef=0.0))
    plan = one.plan(1, table)
    one.observe(plan, table)
    assert math.isnan(one.metrics(plan, table)["kl"])
    with pytest.raises(ValueError, match=r"every sample must have a kl with algorithm.kl.coef 0.15, got 16 without"):
        controller().plan(1, table)
    with pytest.raises(ValueError, match=r"kl must be finite, got inf \(group '1/q0', sample 0\)"):
        controller().plan(1, samples(kl=math.inf))


def test_a_component_must_not_take_the_name_of_another_metric() -> None:
    with pytest.raises(ValueError, match=r"must not be named \['score'\]"):
        RewardConfig(components={"score": ComponentConfig(function="examples:judge")})


def test_the_driver_side_loads_no_torch() -> None:
    code = "import sys, learner.controller; assert not {'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=".")
