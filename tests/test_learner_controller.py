"""The controller: score, plan, measure, control; exact resume; figures worked by hand."""

import json
import math
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from learner.algorithm_config import AlgorithmConfig, KLConfig, ReferenceConfig
from learner.config import LearnerConfig
from learner.controller import EmaBaseline, StepController
from reward.config import ComponentConfig, ConstraintConfig, RewardConfig, WeightScheduleConfig
from reward.schema import SAMPLES
from tests.checks import Case, Check, with_twins

ADAPTIVE = KLConfig(coef=0.15, controller="adaptive", target=6.0, horizon=10_000)
REWARD = RewardConfig(
    components={
        "accuracy": ComponentConfig(function="examples:judge", normalize="running"),
        "style": ComponentConfig(function="examples:judge", weight=0.5),
    }
)


EVERYTHING = RewardConfig(
    components={
        "accuracy": ComponentConfig(
            function="examples:judge",
            normalize="running",
            schedule=WeightScheduleConfig(final_weight=0.3, start_step=1, end_step=4),
        ),
        "style": ComponentConfig(function="examples:judge", weight=0.5),
        "harm": ComponentConfig(function="examples:judge", role="cost", weight=2.0),
    },
    constraint=ConstraintConfig(limit=-0.5, window=20, delay_steps=1),
)
"""A normalised and scheduled reward, a plain one, and a cost."""


def samples(
    step: int = 1, *, num_groups: int = 4, kl: float | None = 3.0, harm: tuple[float, ...] | None = None
) -> pa.Table:
    """Four samples a group; with `harm`, the first of them have that component."""
    generator = np.random.default_rng(step)
    harms = [[("harm", value * step)] for value in harm or ()] + [[]] * 4
    rows = [
        {
            "group_id": f"{step}/q{group}",
            "sample_index": index,
            "num_prompt_tokens": 4,
            "num_response_tokens": 2 + index,
            "num_loss_tokens": 2 + index,
            "finish_reason": ("eos", "stop", "length", "eos")[index],
            "components": [
                ("accuracy", float(generator.normal())),
                *([("style", 1.0)] if index else []),
                *harms[index],
            ],
            "kl": None if kl is None else kl + index,
            "oldest_version": step - 1,
            "newest_version": step - 1,
        }
        for group in range(num_groups)
        for index in range(4)
    ]
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def controller(kl: KLConfig = ADAPTIVE, reward: RewardConfig = REWARD, **algorithm: object) -> StepController:
    return StepController(
        reward,
        LearnerConfig(epochs=2, num_minibatches=2, microbatch_tokens=40),
        AlgorithmConfig(kl=kl, **algorithm),
        num_steps=4,
        seed=11,
        max_new_tokens=8,
    )


def full_controller() -> StepController:
    """Every part that has a state."""
    return controller(reward=EVERYTHING, name="reinforce_ema", baseline_decay=0.7, length_coef=0.01)


HARM = (3.0, -1.0, 0.25)


def run(one: StepController, steps: range, **of_samples: object) -> list[bytes]:
    """What the ranks and the run's metrics see, as bytes."""
    seen = []
    for step in steps:
        table = samples(step, **of_samples)
        plan = one.plan(step, table)
        seen.append(pickle.dumps((plan, one.metrics(plan, table))))
        one.observe(plan, table, {})
    return seen


def _forgetting(part: str, value: dict[str, object] | int) -> type[StepController]:
    """A controller that resumes with a part of its state as it is at first."""

    class Forgetful(StepController):
        def load_state_dict(self, state):
            forgotten = {**state[part], **value} if isinstance(value, dict) else value
            super().load_state_dict({**state, part: forgotten})

    return Forgetful


def resumes(controller_type: type[StepController]) -> None:
    """Two steps, a restart and two steps are four steps, bit for bit; an evaluation in between changes nothing."""
    whole = run(full_controller(), range(1, 5), harm=HARM)
    first = full_controller()
    before = run(first, range(1, 3), harm=HARM)
    saved = json.dumps(first.state_dict())
    resumed = full_controller()
    resumed.__class__ = controller_type
    resumed.load_state_dict(json.loads(saved))
    held_out = samples(9, harm=HARM)
    assert resumed.evaluation_metrics(held_out) == first.evaluation_metrics(held_out)
    assert before + run(resumed, range(3, 5), harm=HARM) == whole
    assert json.dumps(first.state_dict()) == saved


CHECKS = (
    Check(
        id="resume",
        run=resumes,
        part=StepController,
        twins={
            "moments": _forgetting("reward", {"accuracy": {"count": 0, "mean": 0.0, "squares": 0.0}}),
            "kl": _forgetting("kl", {"coef": 0.15}),
            "lambda": _forgetting("constraint", {"log_lambda": 0.0}),
            "window": _forgetting("constraint", {"recent": []}),
            "baseline": _forgetting("baseline", {"average": None}),
            "step": _forgetting("step", 0),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


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
    one.observe(plan, table, {})
    assert plan.kl_coef == 0.15
    assert one.plan(2, samples(2)).kl_coef == pytest.approx(0.15 * (1 + 0.2 * 16 / 10_000))


@pytest.mark.parametrize("harm", [None, HARM])
def test_order_of_arrival_changes_no_bit(harm) -> None:
    seen = []
    for shuffle in (False, True):
        one = full_controller() if harm else controller()
        for step in (1, 2, 3):
            table = samples(step, harm=harm)
            if shuffle:
                table = table.take(pa.array(np.random.default_rng(step).permutation(table.num_rows)))
            plan = one.plan(step, table)
            figures = one.metrics(plan, table)
            one.observe(plan, table, {})
            seen.append((pickle.dumps((plan, figures)), json.dumps(one.state_dict())))
    assert seen[:3] == seen[3:]


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
    one.observe(plan, table, {})
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


def test_a_constrained_step_by_hand() -> None:
    """Costs 6, -2, 0.5 in each group of step 1: mean 1.5, 2 above the limit; they count from step 2 on."""
    one = full_controller()
    table = samples(1, harm=HARM)
    plan = one.plan(1, table)
    accuracy = np.array([dict(row)["accuracy"] for row in table["components"].to_pylist()])
    rewards = (accuracy - accuracy.mean()) / accuracy.std() + [0.0, 0.5, 0.5, 0.5] * 4
    rewards -= 0.01 * np.array([2, 3, 4, 5] * 4)
    np.testing.assert_allclose(plan.scores, (rewards - [6.0, -2.0, 0.5, 0.0] * 4) / 2, atol=1e-6)
    figures = one.metrics(plan, table)
    assert (figures["lambda"], figures["cost_mean"], figures["accuracy_weight"]) == (1.0, 1.5, 1.0)
    assert (figures["harm_mean"], figures["harm_num_absent"]) == (pytest.approx(0.75), 4.0)
    one.observe(plan, table, {})
    # Still delayed in step 1; at step 2 the window is 8 costs of step 1 and all 12, doubled, of step 2.
    table = samples(2, harm=HARM)
    plan = one.plan(2, table)
    figures = one.metrics(plan, table)
    assert (figures["lambda"], figures["cost_mean"]) == (1.0, 3.0)
    assert figures["accuracy_weight"] == pytest.approx(1 - 0.7 / 3)
    one.observe(plan, table, {})
    window = [-2.0, 0.5, 6.0, -2.0, 0.5, 6.0, -2.0, 0.5, *[12.0, -4.0, 1.0] * 4]
    assert one.metrics(plan, table)["lambda"] == pytest.approx(math.exp(0.1 * (np.mean(window) + 0.5)))


def test_evaluation_looks_and_leaves_every_state_alone() -> None:
    one = full_controller()
    run(one, range(1, 3), harm=HARM)
    state = json.dumps(one.state_dict())
    figures = one.evaluation_metrics(samples(9, harm=(1.0, 2.0)))
    assert json.dumps(one.state_dict()) == state
    assert figures["cost_mean"] == 27.0
    assert not {"lambda", "baseline", "accuracy_weight"} & set(figures)
    assert math.isnan(one.evaluation_metrics(samples(9))["cost_mean"])


def follows_by_hand(baseline_type) -> None:
    one = baseline_type(0.75)
    seen = []
    for mean in (4.0, 8.0, -1.0):
        seen.append(one.value)
        one.update(mean)
    assert [*seen, one.value] == [0.0, 4.0, 5.0, 3.5]


class _StartsAtZero(EmaBaseline):
    def __init__(self, decay):
        super().__init__(decay)
        self._average = 0.0


class _KeepsTheComplement(EmaBaseline):
    def __init__(self, decay):
        super().__init__(1.0 - decay)


BASELINES = (
    Check(
        id="ema-baseline",
        run=follows_by_hand,
        part=EmaBaseline,
        twins={"starts-at-0": _StartsAtZero, "decay-swapped": _KeepsTheComplement},
    ),
)


@with_twins(BASELINES)
def test_baseline(case: Case) -> None:
    case.verify()


def test_a_step_is_planned_against_the_steps_before_it() -> None:
    one = full_controller()
    table = samples(1, harm=HARM)
    first = one.plan(1, table)
    assert (first.baseline, one.metrics(first, table)["baseline"]) == (0.0, 0.0)
    one.observe(first, table, {})
    second = one.plan(2, samples(2, harm=HARM))
    assert second.baseline == first.scores.mean()
    plain = controller()
    plain.observe(plain.plan(1, samples()), samples(), {})
    assert plain.plan(2, samples(2)).baseline == 0.0
    assert set(plain.state_dict()) == {"step", "kl", "reward"}


def test_with_a_moving_reference_the_ranks_measure_the_kl_that_is_controlled() -> None:
    one = controller(reference=ReferenceConfig(mode="ema", decay=0.9))
    table = samples(kl=10.5)  # mean 12 to the first policy: above the target, where the moving reference is at it
    one.observe(one.plan(1, table), table, {"reference_kl": 6.0})
    assert one.plan(2, samples(2)).kl_coef == 0.15
    one.observe(one.plan(2, samples(2)), samples(2), {"reference_kl": 3.0})
    assert one.plan(3, samples(3)).kl_coef == pytest.approx(0.15 * (1 - 0.2 * 16 / 10_000))
    with pytest.raises(KeyError, match="reference_kl"):
        one.observe(one.plan(3, table), table, {})
    one.plan(4, samples(4, kl=None))  # whose own KL nothing needs


def test_length_penalties_are_a_part_of_the_score() -> None:
    table = samples(num_groups=2)
    scores = {
        name: controller(**settings).plan(1, table).scores
        for name, settings in {
            "none": {},
            "overlong": {"overlong_buffer": 0.5, "overlong_coef": 2.0},
            "linear": {"length_coef": 0.1},
        }.items()
    }
    # 2, 3, 4, 5 tokens of at most 8; the buffer begins at 4 and the penalty grows by 2 / 4 a token.
    np.testing.assert_allclose(scores["none"] - scores["overlong"], [0.0, 0.0, 0.0, 0.5] * 2, atol=1e-12)
    np.testing.assert_allclose(scores["none"] - scores["linear"], [0.2, 0.3, 0.4, 0.5] * 2, atol=1e-12)
