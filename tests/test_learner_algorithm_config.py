"""The algorithm's configuration: presets, what may be set apart, what would be ignored."""

from typing import Any

import pytest
from pydantic import ValidationError

from learner import estimators
from learner.algorithm_config import AlgorithmConfig
from learner.algorithms import estimator_of, policy_loss_of
from learner.parts import ADVANTAGES, POLICY_LOSSES
from learner.presets import OFFLINE, ONLINE
from tests.checks import Case, Check, with_twins


def config(given: Any) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(given)


def refused(given: Any, *words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ONLINE)
def test_a_preset_loads_from_its_name_and_spells_everything_out(name) -> None:
    one = config(name)
    assert one == config({"name": name})
    spelled = one.model_dump(mode="json")
    assert spelled["name"] == name
    assert set(spelled) == set(AlgorithmConfig.model_fields)
    assert config(spelled) == one
    assert AlgorithmConfig.model_validate_json(one.model_dump_json()) == one


@pytest.mark.parametrize("name", ONLINE)
def test_a_preset_differs_from_every_other(name) -> None:
    own = config(name).model_dump(exclude={"name"})
    assert all(own != config(other).model_dump(exclude={"name"}) for other in ONLINE if other != name)


PARTS = {
    "ppo": {"advantage": "gae", "policy_loss": "ppo_clip", "whiten_advantages": True, "aggregation": "token_mean"},
    "a2c": {"advantage": "gae", "policy_loss": "policy_gradient", "whiten_advantages": False},
    "reinforce": {"advantage": "returns", "baseline": "none", "policy_loss": "policy_gradient"},
    "reinforce_batch_mean": {"advantage": "returns", "baseline": "batch_mean"},
    "reinforce_ema": {"advantage": "returns", "baseline": "ema"},
    "reinforce_value": {"advantage": "gae", "gae_lambda": 1.0, "policy_loss": "policy_gradient"},
    "rloo": {"advantage": "leave_one_out", "ratio": "sequence", "aggregation": "sequence_mean_token_sum"},
    "reinforce_plus_plus": {"advantage": "returns", "baseline": "none", "whiten_advantages": True},
    "reinforce_plus_plus_baseline": {"advantage": "returns", "baseline": "group_mean", "whiten_advantages": True},
    "grpo": {"advantage": "group", "scale_by_std": True, "aggregation": "sequence_mean_token_mean"},
    "dr_grpo": {"advantage": "group", "scale_by_std": False, "aggregation": "sequence_mean_token_sum_norm"},
    "dapo": {"advantage": "group", "clip_range_high": 0.28, "aggregation": "token_mean", "overlong_buffer": 0.2},
    "gspo": {"advantage": "group", "ratio": "sequence_mean", "aggregation": "sequence_mean_token_mean"},
    "cispo": {"advantage": "group", "policy_loss": "cispo", "clip_range": 1.0, "aggregation": "token_mean"},
}
"""As the papers have them."""
KL = {
    "reinforce_plus_plus": {"placement": "reward"},
    "reinforce_plus_plus_baseline": {"placement": "loss", "estimator": "k2"},
    "grpo": {"placement": "loss", "estimator": "k3", "coef": 0.04},
    "dr_grpo": {"coef": 0.0},
    "dapo": {"coef": 0.0},
    "gspo": {"coef": 0.0},
    "cispo": {"coef": 0.0},
}


@pytest.mark.parametrize("name", ONLINE)
def test_a_preset_has_its_papers_parts(name) -> None:
    one = config(name).model_dump()
    assert {key: one[key] for key in PARTS[name]} == PARTS[name]
    assert {key: one["kl"][key] for key in KL.get(name, {})} == KL.get(name, {})
    assert (one["dynamic_sampling"] is not None) == (name == "dapo")


def test_what_is_written_goes_over_the_preset() -> None:
    assert config({"name": "rloo", "clip_range": 0.1}).clip_range == 0.1
    assert config({"name": "rloo", "clip_range": 0.1}).advantage == "leave_one_out"
    assert config({}) == config("ppo") == AlgorithmConfig()
    assert config({"gamma": 0.9}).name == "ppo"


def sections_are_merged(load: Any) -> None:
    """One field of a section: the preset's others stay."""
    kl = load({"name": "grpo", "kl": {"coef": 0.1}}).kl
    assert (kl.coef, kl.placement, kl.estimator) == (0.1, "loss", "k3")
    sampling = load({"name": "dapo", "dynamic_sampling": {"max_waves": 5}}).dynamic_sampling
    assert (sampling.max_waves, sampling.component) == (5, None)
    assert load({"name": "dapo", "dynamic_sampling": None}).dynamic_sampling is None
    assert load({"name": "dapo", "clip_range": 0.3}).clip_range_high == 0.28


def section_replaced(given: dict[str, Any]) -> AlgorithmConfig:
    return config({**ONLINE[given["name"]].settings, **given})


def preset_over_what_is_written(given: dict[str, Any]) -> AlgorithmConfig:
    return config({**given, **ONLINE[given["name"]].settings})


def without_the_preset(given: dict[str, Any]) -> AlgorithmConfig:
    return config({key: value for key, value in given.items() if key != "name"})


def guarded(load: Any) -> Any:
    """A twin may also fail by refusing what is right."""

    def loaded(given: dict[str, Any]) -> AlgorithmConfig:
        try:
            return load(given)
        except ValidationError as error:
            raise AssertionError(str(error)) from error

    return loaded


CHECKS = (
    Check(
        id="merge",
        run=sections_are_merged,
        part=config,
        twins={
            "preset-last": guarded(preset_over_what_is_written),
            "no-preset": guarded(without_the_preset),
        },
    ),
)


@with_twins(CHECKS)
def test_check(case: Case) -> None:
    case.verify()


@pytest.mark.parametrize("name", ["gppo", "GRPO", "", *OFFLINE])
def test_an_unknown_name_is_answered_with_the_known_ones(name) -> None:
    refused(name, "name must be one of ppo, a2c, ", f"got {name!r}", "`concord offline` has the others")


@pytest.mark.parametrize("given", [5, None, ["ppo"], {"name": None}, {"name": ["ppo"]}, {"name": {"x": 1}}], ids=str)
def test_what_is_no_name_is_refused(given) -> None:
    refused(given)


VTRACE = {"advantage": "vtrace", "off_policy": {"weight": "none"}}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"baseline": "batch_mean"}, "baseline"),
        ({"name": "reinforce", "baseline_decay": 0.5}, "baseline_decay"),
        ({"scale_by_std": False}, "scale_by_std"),
        ({"n_step": 3}, "n_step"),
        ({"vtrace_rho": 2.0}, "vtrace_rho"),
        ({"vtrace_c": 2.0}, "vtrace_c"),
        ({"name": "rloo", "gae_lambda": 0.9}, "gae_lambda"),
        ({"advantage": "n_step", "gae_lambda": 0.9}, "gae_lambda"),
        ({"name": "grpo", "gamma": 0.99}, "gamma"),
        ({"name": "cispo", "ratio": "sequence"}, "ratio"),
        ({"name": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"name": "reinforce", "clip_range": 0.3}, "clip_range"),
        ({"name": "a2c", "clip_range_high": 0.3}, "clip_range_high"),
        ({"name": "rloo", "value_clip_range": 0.3}, "value_clip_range"),
        ({"name": "rloo", "value_coef": 0.5}, "value_coef"),
        ({"overlong_coef": 2.0}, "overlong_coef"),
        ({"name": "rloo", "reference": {"every": 2}}, "every"),
        ({"reference": {"mode": "swap"}}, "every"),
        ({"reference": {"mode": "ema", "every": 3, "decay": 0.9}}, "every"),
        ({"reference": {"mode": "ema"}}, "decay"),
        ({"off_policy": {"mask": "token"}}, "mask_range"),
        ({"off_policy": {"mask_range": [0.5, 2.0]}}, "mask_range"),
        ({"off_policy": {"weight": "none", "max_weight": 3.0}}, "max_weight"),
        ({"advantage": "vtrace"}, "off_policy.weight"),
        ({"kl": {"target": 6.0, "horizon": 1000}}, "target"),
        ({"kl": {"controller": "adaptive", "target": 6.0}}, "horizon"),
    ],
    ids=str,
)
def test_a_setting_that_would_be_ignored_is_an_error(given, field) -> None:
    refused(given, field)


@pytest.mark.parametrize(
    "given",
    [
        {"name": "reinforce_ema", "baseline_decay": 0.5},
        {"name": "grpo", "scale_by_std": False},
        {"advantage": "n_step", "n_step": 3},
        {**VTRACE, "vtrace_rho": 2.0, "vtrace_c": 1.5, "gae_lambda": 0.9},
        {"name": "reinforce", "gamma": 0.9},
        {"name": "reinforce_ema", "clip_range": 0.3, "policy_loss": "ppo_clip"},
        {"name": "ppo", "dual_clip": 3.0, "clip_range_high": 0.3, "target_kl": 0.02, "value_clip_range": None},
        {"overlong_buffer": 0.5, "overlong_coef": 2.0},
        {"reference": {"mode": "swap", "every": 3}},
        {"reference": {"mode": "ema", "decay": 0.99}},
        {"off_policy": {"weight": "sequence", "max_weight": None, "mask": "sequence", "mask_range": [0.999, 1.001]}},
        {"kl": {"controller": "adaptive", "target": 6.0, "horizon": 1000}},
    ],
    ids=str,
)
def test_settings_that_are_read_are_taken_and_round_trip(given) -> None:
    one = config(given)
    assert config(one.model_dump(mode="json")) == one


@pytest.mark.parametrize(
    ("kl", "words"),
    [
        ({"estimator": "k2"}, ("`estimator` must be k1", "placement reward")),
        ({"importance_weighted": True}, ("`importance_weighted` false", "placement reward")),
        ({"placement": "loss"}, ("`estimator` must be k2 or k3 with placement loss, got k1",)),
        ({"placement": "loss", "estimator": "k4"}, ("'k1', 'k2' or 'k3'",)),
        ({"controller": "adaptive", "target": 6.0, "horizon": 9, "coef": 0.0}, ("coef must be greater than 0",)),
    ],
)
def test_an_estimator_has_its_places(kl, words) -> None:
    refused({"kl": kl}, *words)


@pytest.mark.parametrize(
    "kl",
    [
        {},
        {"placement": "loss", "estimator": "k2"},
        {"placement": "loss", "estimator": "k3"},
        {"placement": "loss", "importance_weighted": True},
        {"placement": "loss", "estimator": "k3", "importance_weighted": True},
    ],
    ids=str,
)
def test_an_estimator_in_its_place_is_taken(kl) -> None:
    assert config({"kl": kl}).kl.placement == kl.get("placement", "reward")


@pytest.mark.parametrize("mask_range", [[2.0, 0.5], [1.0, 1.0], [-1.0, 2.0], [0.5]])
def test_a_mask_has_a_lower_and_an_upper_bound(mask_range) -> None:
    refused({"off_policy": {"mask": "token", "mask_range": mask_range}}, "mask_range")


@pytest.mark.parametrize(
    ("given", "needs_values"),
    [
        ("ppo", True),
        ("a2c", True),
        ("reinforce_value", True),
        ("reinforce", False),
        ("rloo", False),
        ("grpo", False),
        ({"advantage": "n_step"}, True),
        (VTRACE, True),
        ({"advantage": "my_file:mine"}, True),
        ({"advantage": "my_file:mine", "value_coef": 0.0}, False),
        ({"policy_loss": "my_file:mine"}, True),
    ],
    ids=str,
)
def test_values_are_needed_where_an_estimator_reads_them(given, needs_values) -> None:
    assert config(given).needs_values == needs_values


@pytest.mark.parametrize("path", ["my_file:mine", "my.package:mine"])
def test_a_function_of_ones_own_may_read_any_setting(path) -> None:
    own = {"advantage": path, "baseline": "batch_mean", "n_step": 3, "vtrace_rho": 2.0, "scale_by_std": False}
    assert config(own).advantage == path
    own = {"policy_loss": path, "ratio": "sequence", "dual_clip": 3.0, "clip_range_high": 0.5}
    assert config(own).policy_loss == path


@pytest.mark.parametrize("name", ["gea", "mine:", ":mine", "a b:c", "a:b:c", "a/b.py:c"])
@pytest.mark.parametrize("field", ["advantage", "policy_loss"])
def test_what_is_neither_a_part_nor_a_path_is_refused(field, name) -> None:
    refused({field: name}, f"{field} must be one of", "module:function", repr(name))


def test_every_part_that_may_be_named_is_there() -> None:
    for advantage in ADVANTAGES:
        off_policy = {"weight": "none"} if advantage == "vtrace" else {}
        assert estimator_of(config({"advantage": advantage, "off_policy": off_policy})).__name__ == advantage
    for policy_loss in POLICY_LOSSES:
        assert policy_loss_of(config({"policy_loss": policy_loss})).__name__ == policy_loss


def test_a_path_leads_to_its_function() -> None:
    one = config({"advantage": "learner.estimators:group", "policy_loss": "learner.losses:policy_gradient"})
    assert estimator_of(one) is estimators.group
    assert policy_loss_of(one).__name__ == "policy_gradient"
    for path in ("no_such_module:mine", "learner.losses:no_such_function"):
        with pytest.raises(ValueError, match="a function must"):
            estimator_of(config({"advantage": path}))
