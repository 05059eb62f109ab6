"""Which components a reward section may have."""

import pytest

from reward.config import ComponentConfig, RewardConfig


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
