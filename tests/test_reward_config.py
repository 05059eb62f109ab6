"""Which components a reward section may have."""

import pytest

from reward.config import ComponentConfig, ConstraintConfig, RewardConfig, WeightScheduleConfig
from reward.credit_config import CreditConfig


@pytest.mark.parametrize("name", ["", "2nd", "a b", "a-b", "a/b", "a.b", "name\n", "eval_style"])
def test_names_that_cannot_begin_a_metric_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"component names must be letters, digits and underscores.*got '"):
        RewardConfig(components={name: ComponentConfig(function="rules:length")})


@pytest.mark.parametrize("name", ["a", "_a", "Style2", "evaluation", "a_eval_"])
def test_other_names_are_fine(name: str) -> None:
    RewardConfig(components={name: ComponentConfig(function="rules:length")})


@pytest.mark.parametrize(("field", "value"), [("input", "response"), ("max_tokens", 64), ("ensemble", ["other_model"])])
def test_what_a_function_would_ignore_is_refused(field: str, value: object) -> None:
    ComponentConfig.model_validate({"model": "some_model", field: value})
    with pytest.raises(ValueError, match=f"`{field}` belongs to a model; remove it"):
        ComponentConfig.model_validate({"function": "rules:length", field: value})


def test_a_saved_function_component_loads_again() -> None:
    component = ComponentConfig(function="rules:length")
    assert ComponentConfig.model_validate_json(component.model_dump_json()) == component


HELP = ComponentConfig(function="rules:help")
HARM = ComponentConfig(model="cost_model", role="cost")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"components": {"harm": HARM}, "constraint": ConstraintConfig()},
            r"must hold one of role reward, got costs only",
        ),
        ({"components": {"help": HELP, "harm": HARM}}, r"`constraint` must be set with components of role cost"),
        (
            {"components": {"help": HELP}, "constraint": ConstraintConfig()},
            r"`constraint` must be set with components of",
        ),
        (
            {"components": {"help": HELP, "cost": HARM}, "constraint": ConstraintConfig()},
            r"must not be named \['cost'\] with a constraint; cost_mean is the weighted sum",
        ),
        (
            {"components": {"help": HELP}, "credit": CreditConfig(component="hlep", kind="potential")},
            r"credit.component must be one of \['help'\], got 'hlep'",
        ),
        (
            {"components": {"help": HELP}, "credit": CreditConfig(component="help", kind="attention")},
            r"credit.component must be a model with kind attention, got the function 'help'",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)


def test_without_a_constraint_a_judge_may_be_called_cost() -> None:
    RewardConfig(components={"cost": HELP})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WeightScheduleConfig(final_weight=0.0, start_step=4, end_step=4),
            r"greater than start_step = 4, got 4",
        ),
        (lambda: ConstraintConfig(initial_lambda=9.0, max_lambda=5.0), r"max_lambda = 5.0, got 9.0"),
        (
            lambda: ComponentConfig(model="m", role="cost", normalize="running"),
            r"`normalize` must be none with role cost, got running",
        ),
        (
            lambda: ComponentConfig(
                model="m", role="cost", schedule=WeightScheduleConfig(final_weight=0.0, end_step=9)
            ),
            r"`schedule` must be left out with role cost",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_saved_section_loads_again() -> None:
    scheduled = ComponentConfig(function="rules:help", schedule=WeightScheduleConfig(final_weight=0.0, end_step=9))
    section = RewardConfig(
        components={"help": scheduled, "harm": HARM},
        constraint=ConstraintConfig(limit=-0.5, max_lambda=20.0),
        credit=CreditConfig(component="harm", kind="attention"),
    )
    assert RewardConfig.model_validate_json(section.model_dump_json()) == section


@pytest.mark.parametrize(
    ("step", "weight"), [(0, 2.0), (3, 2.0), (4, 1.25), (5, 0.5), (6, -0.25), (7, -1.0), (99, -1.0)]
)
def test_a_weight_between_two_steps(step: int, weight: float) -> None:
    schedule = WeightScheduleConfig(final_weight=-1.0, start_step=3, end_step=7)
    assert ComponentConfig(function="rules:help", weight=2.0, schedule=schedule).weight_at(step) == weight
