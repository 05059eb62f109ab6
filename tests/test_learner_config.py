"""Limits of the learner's settings."""

import pytest

from learner.config import LearnerConfig, OptimizerConfig


@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, 1.5], [0.9, float("nan")]])
def test_decay_rates_are_at_least_0_and_below_1(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas"):
        OptimizerConfig.model_validate({"betas": betas})


def test_decay_rates_may_be_0() -> None:
    assert OptimizerConfig.model_validate({"betas": [0.0, 0.999]}).betas == (0.0, 0.999)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"first_epoch_bytes": 64, "num_minibatches": 2}, "first_epoch_bytes must be left out or 0, got 64"),
        ({"first_epoch_bytes": 64, "zero_stage": 3}, "first_epoch_bytes must be left out or 0, got 64"),
        ({"offload": "optimizer", "zero_stage": 0}, "offload must be none with backend zero and zero_stage 0"),
        ({"offload": "optimizer", "backend": "local"}, "offload must be none with backend local"),
    ],
    ids=str,
)
def test_what_would_be_ignored_is_refused(settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        LearnerConfig.model_validate(settings)


def test_graphs_may_be_refused_where_none_could_be_kept() -> None:
    settings = {"first_epoch_bytes": 0, "num_minibatches": 2, "zero_stage": 3}
    assert LearnerConfig.model_validate(settings).first_epoch_bytes == 0
